"""The keeper of the queue: begins the jobs that wait on this host, in order, as many at a time as may be at work."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_train.config.loading import load_config
from dist_train.distributed.process_info import threads_per_process
from dist_train.errors import ConfigError, DistTrainError, RunDirError
from dist_train.launch import gpus
from dist_train.launch.job_queue import changing, is_of_this_host, jobs_at_a_time, waiting_jobs
from dist_train.launch.resume import begin_start, start_log
from dist_train.runs import kernel_lock, start_lock
from dist_train.runs.directory import RunDir
from dist_train.runs.start_lock import hold_start_lock, note_start
from dist_train.runs.summary import Summary, summarise

_DEVICES = "CUDA_VISIBLE_DEVICES"
_EVERY_S = 0.5  # between two looks, while no job can be begun


def keep(runs_root: Path, lock: int, say: Callable[[str], object]) -> None:
    """Begin the jobs that wait on this host; return when none does. `lock`: the descriptor of the keeper's lock."""
    said = ""
    while (job := _first(runs_root, lock)) is not None:
        try:
            given = _resources(job.run_dir, jobs_at_work(runs_root), jobs_at_a_time(runs_root))
            if given is not None and begin(job.run_dir, given):
                say(f"{job.name}: begun")
                continue
        except DistTrainError as error:  # the disk is full, for example: once more, but said once
            if (text := f"{job.name}: {error}") != said:
                say(said := text)
        time.sleep(_EVERY_S)


def jobs_at_work(runs_root: Path) -> list[RunDir]:
    """Return the jobs of this host whose launcher is alive."""
    held = (path.parent for path in runs_root.glob(f"*/{start_lock.NAME}") if kernel_lock.is_held(path))
    return [job.run_dir for job in map(summarise, held) if is_of_this_host(job)]


def begin(run_dir: RunDir, given: Mapping[str, Any]) -> bool:
    """Begin a job, once: that it was begun is on the disk before its launcher is. False: it does not wait any more.

    `given`: what is added to job.json and to its environment there.

    Raises:
        RunDirError: another process holds its lock, or its directory cannot be written.
    """
    with hold_start_lock(run_dir) as lock:
        with changing(run_dir.path.parent):
            job = run_dir.read_job()
            if "number" not in job or "begun" in job or run_dir.status.read():  # its state counts the lock held here
                return False
            environment = job.get("environment", {}) | given["environment"]
            job |= {**given, "environment": environment, "begun": round(time.time(), 3)}
            run_dir.write_job(job)
        try:
            begin_start(run_dir, lock)
        except RunDirError as error:  # its folder or interpreter is gone: the jobs behind it do not wait for that
            note_start(run_dir)
            start_log(run_dir).write_text(f"{error}\n")
    return True


def _first(runs_root: Path, lock: int) -> Summary | None:
    """Return the first job that waits on this host. If there is none, the keeper is one no more."""
    with changing(runs_root):  # who queues a job after this finds no keeper, and begins one
        first = next(filter(is_of_this_host, waiting_jobs(runs_root)), None)
        if first is None:
            fcntl.flock(lock, fcntl.LOCK_UN)
    return first


def _resources(run_dir: RunDir, at_work: Sequence[RunDir], jobs: int) -> dict[str, Any] | None:
    """Return the GPUs or the threads of a job, for job.json, as its later starts need the same; None: they are in use.

    `jobs`: how many may be at work at a time without a GPU.
    """
    job, records = run_dir.read_job(), [other.read_job() for other in at_work]
    environment, nproc = job.get("environment", {}), job.get("nproc", 1)
    every = gpus.all_gpus() if _may_use_gpu(run_dir) else []
    usable = gpus.visible(every, environment.get(_DEVICES))
    if not usable:
        if sum(not record.get("gpus") for record in records) >= jobs:
            return None
        return _given(environment, threads_per_process(jobs * nproc, environment))
    given = {gpu for record in records for gpu in record.get("gpus", [])}
    free = [gpu for gpu in usable if gpu not in given]
    needed = min(nproc, len(usable))  # a job for more than there are is begun, and says so
    if len(free) >= needed:
        busy = gpus.busy_gpus()
        free = [gpu for gpu in free if gpu not in busy]
    if len(free) < needed:
        return None
    return _given(environment, threads_per_process(len(every), environment), free[:needed])


def _given(environment: Mapping[str, str], threads: int, gpus: Sequence[str] = ()) -> dict[str, Any]:
    added = {"OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", str(threads))}
    return {"environment": added | ({_DEVICES: ",".join(gpus)} if gpus else {}), "gpus": [*gpus]}


def _may_use_gpu(run_dir: RunDir) -> bool:
    try:
        return load_config(str(run_dir.config)).device in ("auto", "cuda")
    except (ConfigError, OSError):  # damaged: its start says so
        return False
