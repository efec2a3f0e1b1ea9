"""A run without account and network: W&B's own files hold all its metrics."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_train.config.loading import parse_config
from dist_train.distributed.world import World
from dist_train.runs.attempt import begin_attempt
from dist_train.runs.directory import RunDir
from dist_train.training.tracking import Tracker
from support.patience import wait_until
from support.processes import alive, run, started
from support.ranks import join_group, run_on_ranks
from support.run_files import metrics
from support.trainings import release, save, train

CONFIG = parse_config({"optimizer": {"lr": 0.125}, "tracking": {"project": "test", "tags": ["a"]}})
FIRST: list[dict[str, Any]] = [
    {"step": 2, "train/loss": 0.5, "train/grad_norm": None},
    {"step": 4, "train/loss": 0.25, "train/grad_norm": 1.5},
    {"step": 4, "val/accuracy": 0.9},
]
SECOND: list[dict[str, Any]] = [{"step": 6, "train/loss": 0.125}]


def log_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    os.environ["WANDB_MODE"] = "offline"
    run_dir = RunDir(path)
    join_group("wandb")
    world = World.join(CONFIG)  # Accelerate's trackers need its state
    begin_attempt(run_dir, CONFIG, wandb_id="of this attempt")
    tracker = Tracker(
        run_dir, CONFIG, {"world_size": world.size, "device": "cpu", "mixed_precision": "no"}, enabled=True
    )
    for line in lines:
        tracker.log(line)
    tracker.finish({"test/accuracy": 0.75})


def attempt(run_dir: RunDir, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what W&B reads in the offline folder of one attempt."""
    before = set(run_dir.path.glob("wandb/offline-run-*"))
    run_on_ranks(log_lines, run_dir.path, lines, world_size=1)
    (folder,) = set(run_dir.path.glob("wandb/offline-run-*")) - before
    return read(folder)


def read(folder: Path) -> list[dict[str, Any]]:
    """Read a folder with W&B's own reader."""
    argv = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    output = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in output.splitlines()]


def steps_of(records: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {row["step"]["num"]: without_own(row["item"]) for row in of_kind(records, "history")}


def of_kind(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record[kind] for record in records if record["type"] == kind]


def without_own(items: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in items.items() if not name.startswith("_")}


def test_two_attempts_are_one_run_with_every_metric_at_its_step(run_dir: RunDir) -> None:
    begin_attempt(run_dir, CONFIG, wandb_id="id")
    history = []
    for records in (attempt(run_dir, FIRST), attempt(run_dir, SECOND)):
        run = of_kind(records, "run")[0]
        assert (run["run_id"], run["project"], run["display_name"]) == ("id", "test", "run")
        assert set(run["tags"]) == {"a", "world_size=1", "fp32", "cpu"}
        assert run["job_type"] == "train"
        assert any("optimizer.lr" in json.dumps(record) for record in records)
        assert any(record["update"].get("test/accuracy") == 0.75 for record in of_kind(records, "summary"))
        history += [(row["step"]["num"], without_own(row["item"])) for row in of_kind(records, "history")]
    # W&B keeps one row per step: the two lines of step 4 are one.
    assert history == [
        (2, {"step": 2, "train/loss": 0.5}),
        (4, {"step": 4, "train/loss": 0.25, "train/grad_norm": 1.5, "val/accuracy": 0.9}),
        (6, {"step": 6, "train/loss": 0.125}),
    ]
    assert list(run_dir.metrics.read()) == FIRST + SECOND


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_or_killed_run_resumes_with_same_id(end: signal.Signals, tmp_path: Path) -> None:
    """Same id. After an agreed stop no gaps and no repeats; after a kill repeated steps have the same values."""
    run_dir = tmp_path / "runs/r"
    command = train("save_every=200 steps", "log_every=1", "model.args.slow_s=3", nproc=None)

    def recorded(beyond: int) -> bool:
        """Whether W&B, which takes as long to start as such a run, has recorded a later step."""
        records = run_dir.glob("wandb/offline-run-*/run-*.wandb")
        return any(max(steps_of(read(record.parent)), default=0) > beyond for record in records)

    with started(command, tmp_path, None, WANDB_MODE="offline") as process:
        wait_until(lambda: recorded(0), "record", every_s=3)
        saved = save(run_dir)
        wait_until(lambda: recorded(saved), "record of steps that will be repeated", every_s=3)
        process.send_signal(end)
        process.communicate()
        wait_until(lambda: not alive(tmp_path), "end of W&B's own process, which writes what it has")
    release(tmp_path)
    assert run(command, tmp_path, WANDB_MODE="offline").returncode == 0
    segments = sorted(run_dir.glob("wandb/offline-run-*"))
    assert len({path.name.rpartition("-")[2] for path in segments}) == 1
    first, second = (steps_of(read(path)) for path in segments)

    again = first.keys() & second.keys()
    assert bool(again) == (end == signal.SIGKILL)
    for step in again:
        mine, theirs = (
            {key: value for key, value in rows[step].items() if not is_time(key)} for rows in (first, second)
        )
        assert mine == theirs
    once: dict[int, dict[str, Any]] = {}
    for line in metrics(run_dir):
        row = once.setdefault(line["step"], {})
        assert row.keys().isdisjoint(key for key in line if "/" in key), "a line is repeated"
        row |= {key: value for key, value in line.items() if value is not None}
    assert first | second == once


def is_time(key: str) -> bool:
    return key.startswith("perf/") or key in ("attempt", "epoch_s", "time")
