"""The queue: run directories that wait to be begun one after another, by a keeper on the host that queued them.

A job is a run directory with a job.json. The keeper is a process that outlives whoever began it; only locks say whether
one is at work, and which jobs are. One that was killed is replaced by whoever queues a job or looks at the queue next.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_train.atomic_files import fsync, read_json, remove, write_json
from dist_train.config.batch_plan import BatchPlan
from dist_train.config.schema import Config
from dist_train.distributed.process_info import surroundings
from dist_train.errors import RunDirError
from dist_train.launch.subprocesses import begin_detached
from dist_train.runs import kernel_lock
from dist_train.runs.directory import RunDir
from dist_train.runs.start_options import check_run_name
from dist_train.runs.summary import Summary, summarise, summarise_existing


def create_job(run_dir: RunDir, config: Config, nproc: int) -> None:
    """Make the directory of a job, which is CREATED until it is queued.

    It will train on `nproc` processes of this machine, in this folder, with this interpreter and the variables of this
    process that run.json records.

    Raises:
        ConfigError: the name is invalid, or the batch cannot be divided among so many processes.
        RunDirError: there is a run of that name, or the directory cannot be written.
    """
    check_run_name("--run-name", run_dir.path.name, run_dir.path.parent)
    BatchPlan.of(config, nproc)
    if not run_dir.create(new=True):
        raise RunDirError(f"{run_dir.path} exists already. Choose another --run-name for the job.")
    try:
        run_dir.write_config(config)
        run_dir.write_job({"nproc": nproc, **surroundings()})
    except RunDirError:
        remove(run_dir.path)  # or the name would be taken by half a job
        raise
    fsync(run_dir.path.parent)


def enqueue(path: Path) -> None:
    """Put a created job at the end of the queue of this host. `ensure_keeper` then sees that it is begun.

    Raises:
        RunDirError: it is not a created job, or its directory cannot be written.
    """
    with changing(path.parent):
        job = _job_in_state(path, "CREATED")
        numbers = (RunDir(other.parent).read_job().get("number", 0) for other in path.parent.glob("*/job.json"))
        RunDir(path).write_job(job | {"number": max(numbers, default=0) + 1, "host": socket.gethostname()})


def take_back(path: Path) -> None:
    """Take a job that waits out of the queue: it is CREATED again.

    Raises:
        RunDirError: it does not wait, or its directory cannot be written.
    """
    with changing(path.parent):
        job = _job_in_state(path, "QUEUED")
        RunDir(path).write_job({name: value for name, value in job.items() if name not in ("number", "host")})


def waiting_jobs(runs_root: Path) -> list[Summary]:
    """Return the jobs that wait, of all hosts, in the order in which they will be begun."""
    records = ((path, read_json(path)) for path in runs_root.glob("*/job.json"))
    # A summary reads several files: only of those that may wait.
    candidates = (summarise(path.parent) for path, job in records if "number" in job and "begun" not in job)
    return in_order(candidates)


def in_order(runs: Iterable[Summary]) -> list[Summary]:
    """Return those that wait in the queue, in the order in which they will be begun."""
    return sorted((run for run in runs if run.state == "QUEUED"), key=lambda run: (run.queue_number, run.name))


def places(waiting: Iterable[Summary]) -> dict[str, int]:
    """Return the place of each job in the queue of its host, from 1, by name. `waiting`: in order."""
    found: dict[str, int] = {}
    counts: dict[str | None, int] = {}
    for job in waiting:
        found[job.name] = counts[job.queue_host] = counts.get(job.queue_host, 0) + 1
    return found


def is_of_this_host(job: Summary) -> bool:
    return job.queue_host == socket.gethostname()


def ensure_keeper(runs_root: Path, jobs: int | None = None) -> None:
    """Begin the keeper of this host unless one is at work. It ends when no job of this host waits.

    `jobs`: how many may be at work at a time, from now on; None: as many as before, at first 1.

    Raises:
        RunDirError: the folder of runs cannot be written.
    """
    try:
        if jobs is not None:
            write_json(_of_host(runs_root, "json"), {"jobs": jobs})
        lock = kernel_lock.acquire(_of_host(runs_root, "lock"))
        if lock is None:
            return
        try:
            command = [sys.executable, "-m", "dist_train", "queue", "work", str(runs_root.absolute()), str(lock)]
            log = _of_host(runs_root, "log")
            begin_detached(command, log, Path.cwd(), os.environ, inherited=lock, append=True)
        finally:
            os.close(lock)
    except OSError as error:
        raise RunDirError(
            f"The queue in {runs_root} cannot be worked on: {error.filename}: {error.strerror}."
        ) from None


def jobs_at_a_time(runs_root: Path) -> int:
    """Return how many jobs may be at work at a time on this host."""
    found = read_json(_of_host(runs_root, "json")).get("jobs")
    return found if isinstance(found, int) and found > 0 else 1


@contextmanager
def changing(runs_root: Path) -> Iterator[None]:
    """Hold the lock without which no job.json is changed.

    Raises:
        RunDirError: the folder of runs cannot be written.
    """
    try:
        lock = kernel_lock.acquire(runs_root / ".queue.lock", wait=True)
    except OSError as error:
        raise RunDirError(f"{runs_root} cannot be written: {error.strerror}.") from None
    assert lock is not None
    try:
        yield
    finally:
        os.close(lock)


def _job_in_state(path: Path, state: str) -> dict[str, Any]:
    summary = summarise_existing(path)
    if summary.state != state:
        does = "can be queued" if state == "CREATED" else "can be taken back"
        raise RunDirError(f"{summary.name} is {summary.state}: only a job that is {state} {does}.")
    return summary.run_dir.read_job()


def _of_host(runs_root: Path, suffix: str) -> Path:
    """Return a file of the keeper: each host has its own, as two may share the folder."""
    return runs_root / f".queue.{socket.gethostname()}.{suffix}"
