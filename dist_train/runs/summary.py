"""Summary of a live, finished, killed or incomplete run, read from its small files. Never waits, never writes."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from dist_train.config.paths import runs_root
from dist_train.distributed.launcher_watch import is_alive
from dist_train.errors import RunDirError
from dist_train.runs import heartbeat
from dist_train.runs.directory import RunDir
from dist_train.runs.start_lock import is_starting
from dist_train.runs.status_file import ENDS

NOT_BEGUN = ("NEW", "CREATED", "QUEUED")
_NOT_LIVE = frozenset({*ENDS, *NOT_BEGUN, "KILLED", "SILENT"})


@dataclass(frozen=True)
class Summary:
    """What is known of a run without reading all of its metrics. None: unknown, or not known yet."""

    run_dir: RunDir
    # Of status.json, or KILLED: the process is gone; SILENT: no heartbeat for a while; STARTING: begun from outside a
    # shell, and without a status yet; CREATED, QUEUED: a job of the queue; NEW: never started.
    state: str
    step: int
    total_steps: int | None
    epoch: float | None
    attempt: int
    world_size: int | None
    heartbeat: float | None  # time.time()
    best: Mapping[str, float]  # the best evaluation, keys val/...
    metrics: Mapping[str, float]  # the newest values
    seconds: Mapping[str, float]  # wall seconds by use, over all attempts
    result: Mapping[str, Any]  # empty until the run is finished
    job: str | None  # Slurm job id
    queue_host: str | None  # of a job that is queued: whose keeper begins it
    queue_number: int | None

    @property
    def name(self) -> str:
        return self.run_dir.path.name

    @property
    def is_live(self) -> bool:
        return self.state not in _NOT_LIVE

    @property
    def may_be_running(self) -> bool:
        """Whether the run may still be running: a silent one may be compiling."""
        return self.is_live or self.state == "SILENT"

    @property
    def age_s(self) -> float | None:
        """Seconds since the last heartbeat."""
        return None if self.heartbeat is None else max(0.0, time.time() - self.heartbeat)

    @property
    def accuracy(self) -> float | None:
        """The best validation accuracy."""
        return self.best.get("val/accuracy")

    @property
    def test_accuracy(self) -> float | None:
        return self.result.get("test/accuracy")

    def scores(self, split: str) -> Mapping[str, Any]:
        """The metrics that the run is judged by: on val those of its best evaluation, on test those of its end."""
        return self.best if split == "val" else self.result

    @property
    def samples_per_s(self) -> float | None:
        return self.result.get("samples_per_s") or self.metrics.get("perf/samples_per_s")

    @property
    def age_text(self) -> str:
        """ "3 s", "5 min", "2 h", "4 d"."""
        if self.age_s is None:
            return "-"
        for unit, seconds in (("d", 86_400), ("h", 3600), ("min", 60)):
            if self.age_s >= 2 * seconds:
                return f"{self.age_s // seconds:.0f} {unit}"
        return f"{self.age_s:.0f} s"

    @property
    def progress_text(self) -> str:
        """ "600/1000 60%"."""
        return f"{self.step}/{self.total_steps} {self.progress:.0%}" if self.progress is not None else "-"

    @property
    def progress(self) -> float | None:
        """Completed share of all steps, from 0 to 1."""
        return self.step / self.total_steps if self.total_steps else None


def summarise(path: Path) -> Summary:
    """Summarise the run in `path`, which need not exist yet."""
    run_dir = RunDir(path)
    status, queued = run_dir.status.read(), run_dir.read_job()
    return Summary(
        run_dir=run_dir,
        state=_state_of(run_dir, status, queued),
        step=status.get("step", 0),
        total_steps=status.get("total_steps"),
        epoch=status.get("epoch"),
        attempt=status.get("attempt", 0),
        world_size=status.get("world_size") or queued.get("nproc"),
        heartbeat=status.get("heartbeat"),
        best=status.get("best", {}),
        metrics=status.get("metrics", {}),
        seconds=status.get("seconds", {}),
        result=run_dir.read_result(),
        job=_job_of(status, run_dir.read_submission()),
        queue_host=queued.get("host"),
        queue_number=queued.get("number"),
    )


def summarise_existing(path: Path) -> Summary:
    """Summarise a run.

    Raises:
        RunDirError: `path` is not a run directory.
    """
    if not is_run(path):
        raise RunDirError(
            f"{path} is not a run: it has neither status.json nor config.yaml. List runs with dist-train runs ls."
        )
    return summarise(path)


def find_runs(folder: Path) -> Iterator[Summary]:
    """Yield the runs of a folder, sorted by name. A folder that does not exist has none."""
    if not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        paths = sorted(entry.path for entry in entries if entry.is_dir())
    yield from (summarise(path) for path in map(Path, paths) if is_run(path))


def select_runs(folder: Path, names: Sequence[str], states: Sequence[str], sort: str) -> list[Summary]:
    """Return the runs in a folder that match one of `names` (with * and ?) and one of `states`; empty: all.

    `sort`: name, age, progress, accuracy, speed or state; the greatest last.
    """
    wanted = {state.upper() for state in states}
    found = [
        run
        for run in find_runs(folder)
        if (not names or any(fnmatch(run.name, name) for name in names)) and (not wanted or run.state in wanted)
    ]
    low = -math.inf
    keys: dict[str, Callable[[Summary], Any]] = {
        "name": lambda run: run.name,
        "age": lambda run: run.heartbeat or low,  # the newest last
        "progress": lambda run: run.progress or 0.0,
        "accuracy": lambda run: low if run.accuracy is None else run.accuracy,
        "speed": lambda run: run.samples_per_s or low,
        "state": lambda run: run.state,
    }
    return sorted(found, key=keys[sort])


def find_run(path: Path) -> Path:
    """Return `path`, or the run of that name in the folder of runs if only that one exists."""
    named = runs_root() / path
    return named if not is_run(path) and is_run(named) else path


def is_run(path: Path) -> bool:
    """Whether the folder belongs to a run that was started, refused or queued."""
    try:
        return any((path / name).exists() for name in ("status.json", "config.yaml", "slurm.json"))
    except OSError:  # no permission, or a name that is not a legal file name
        return False


def _state_of(run_dir: RunDir, status: Mapping[str, Any], queued: Mapping[str, Any]) -> str:
    if is_starting(run_dir):
        return "STARTING"
    if "state" not in status:
        return _state_before_status(run_dir, queued)
    state: str = status["state"]
    if state in ENDS:
        return state
    silent_s = _silent_s(status, _modified(run_dir.status.path))
    # A container may share this machine's name but not its process ids.
    is_local = status.get("host") == socket.gethostname() and "pid" in status
    if silent_s > heartbeat.LATE_S and is_local and not is_alive(status["pid"]):
        return "KILLED"
    return "SILENT" if silent_s > heartbeat.SILENT_S else state


def _state_before_status(run_dir: RunDir, queued: Mapping[str, Any]) -> str:
    if "begun" in queued:
        return "ERROR" if run_dir.error.exists() else "KILLED"
    if "number" in queued:
        return "QUEUED"
    return "CREATED" if queued else "NEW"


def _silent_s(status: Mapping[str, Any], written: float) -> float:
    """Return how long there has been no heartbeat, by the clock that says least: that of the run's machine, or that of
    the file system, by which status.json was `written`. Each may differ from ours, also far ahead."""
    now, beat = time.time(), float(status.get("heartbeat", 0.0))
    return min(abs(now - beat), abs(now - written))


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _job_of(status: Mapping[str, Any], submitted: Mapping[str, Any]) -> str | None:
    """Return the newest Slurm job of the run, which may have been submitted again."""
    jobs: list[str] = [job for job in (submitted.get("job"), status.get("slurm_job_id")) if job]
    return max(jobs, key=lambda job: int(job.partition("_")[0]), default=None)
