"""Jobs of the queue whose launcher is a small program: what begins them and when is tested, not the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_train.config.loading import parse_config
from dist_train.launch.job_queue import create_job, enqueue
from dist_train.runs.directory import RunDir

# Its arguments: -m dist_train train --resume RUN --nproc N. Who reads "begin" finds the other files complete.
_LAUNCHER = """#!/bin/sh
name=$(basename "$5")
env > {folder}/env.$name
pwd > {folder}/cwd.$name
echo "begin $name" >> {folder}/trace
while [ ! -e {folder}/go ] && [ ! -e {folder}/go.$name ]; do sleep 0.02; done
echo "end $name" >> {folder}/trace
"""


def fake_launcher(folder: Path) -> Path:
    """Write a program to stand for a job's Python. It notes what it is given, and ends when `folder`/go is there."""
    program = folder / "python"
    program.write_text(_LAUNCHER.format(folder=folder))
    program.chmod(0o755)
    return program


def trace(folder: Path) -> list[str]:
    """Return what the fake launchers of a folder did, in order: "begin NAME", "end NAME"."""
    path = folder / "trace"
    return path.read_text().splitlines() if path.exists() else []


def new_job(runs: Path, name: str, nproc: int = 1, settings: dict[str, Any] | None = None, **job: Any) -> RunDir:
    """Create a job. `job`: what differs in its job.json."""
    run_dir = RunDir(runs / name)
    create_job(run_dir, parse_config({"device": "cpu", **(settings or {})}), nproc)
    run_dir.write_job(run_dir.read_job() | job)
    return run_dir


def queued(folder: Path, *names: str, **job: Any) -> list[RunDir]:
    """Queue jobs of the fake launcher in `folder`/runs."""
    program = str(fake_launcher(folder))
    jobs = [new_job(folder / "runs", name, **{"python": program, **job}) for name in names]
    for each in jobs:
        enqueue(each.path)
    return jobs
