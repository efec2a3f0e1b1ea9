"""A run as its small files tell it, whether it goes on, was killed or is half written. Never waits, never writes."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_train.distributed.parent import is_alive
from dist_train.runs.directory import ENDS, RunDir

# A live run writes a heartbeat every few seconds, but not while it compiles its step or waits for a data set.
SILENT_S = 120.0
_BEAT_S = 10.0  # longer than a run that trains is silent


@dataclass(frozen=True)
class Summary:
    """What there is to know without reading all of its metrics. None: not known, or not yet."""

    run_dir: RunDir
    state: str  # as in status.json, or KILLED: its process is gone; SILENT: no heartbeat for a while; NEW: never begun
    step: int
    total_steps: int | None
    epoch: float | None
    attempt: int
    world_size: int | None
    heartbeat: float | None  # time.time()
    best: Mapping[str, float]  # the best evaluation, keys val/...
    metrics: Mapping[str, float]  # of the newest line of metrics
    result: Mapping[str, Any]  # empty until it is finished
    job: str | None  # of Slurm

    @property
    def name(self) -> str:
        return self.run_dir.path.name

    @property
    def is_live(self) -> bool:
        return self.state not in (*ENDS, "KILLED", "SILENT", "NEW")

    @property
    def goes_on(self) -> bool:
        """As far as one can tell: one that is silent may compile."""
        return self.is_live or self.state == "SILENT"

    @property
    def age_s(self) -> float | None:
        """Since it was last heard of."""
        return None if self.heartbeat is None else max(0.0, time.time() - self.heartbeat)

    @property
    def accuracy(self) -> float | None:
        """The best on validation."""
        return self.best.get("val/accuracy")

    @property
    def test_accuracy(self) -> float | None:
        return self.result.get("test/accuracy")

    @property
    def samples_per_s(self) -> float | None:
        return self.result.get("samples_per_s") or self.metrics.get("perf/samples_per_s")

    @property
    def seconds(self) -> Mapping[str, float]:
        """Wall seconds by use, over all attempts."""
        seconds: dict[str, float] = self.run_dir.read_status().get("seconds", {})
        return seconds

    @property
    def progress(self) -> float | None:
        """0 to 1."""
        return self.step / self.total_steps if self.total_steps else None


def summarise(path: Path) -> Summary:
    """`path`: a run directory, or what may become one."""
    run_dir = RunDir(path)
    status = run_dir.read_status()
    return Summary(
        run_dir=run_dir,
        state=_state_of(status),
        step=status.get("step", 0),
        total_steps=status.get("total_steps"),
        epoch=status.get("epoch"),
        attempt=status.get("attempt", 0),
        world_size=status.get("world_size"),
        heartbeat=status.get("heartbeat"),
        best=status.get("best", {}),
        metrics=status.get("metrics", {}),
        result=run_dir.read_result(),
        job=_job_of(status, run_dir.read_submission()),
    )


def find_runs(folder: Path) -> Iterator[Summary]:
    """The runs that lie in a folder, by name."""
    with os.scandir(folder) as entries:
        paths = sorted(entry.path for entry in entries if entry.is_dir())
    yield from (summarise(path) for path in map(Path, paths) if is_run(path))


def is_run(path: Path) -> bool:
    """Whether something of a run lies there: begun, refused or queued."""
    try:
        return any((path / name).exists() for name in ("status.json", "config.yaml", "slurm.json"))
    except OSError:  # somebody else's folder, or no name that a file can have
        return False


def _state_of(status: Mapping[str, Any]) -> str:
    state: str = status.get("state", "NEW")
    if state in (*ENDS, "NEW"):
        return state
    silent_s = time.time() - status.get("heartbeat", 0.0)
    # A container may have this machine's name and processes of its own.
    here = status.get("host") == socket.gethostname() and "pid" in status
    if silent_s > _BEAT_S and here and not is_alive(status["pid"]):
        return "KILLED"
    return "SILENT" if silent_s > SILENT_S else state


def _job_of(status: Mapping[str, Any], submitted: Mapping[str, Any]) -> str | None:
    """The newest: it may have been submitted again."""
    found: list[str] = [job for job in (submitted.get("job"), status.get("slurm_job_id")) if job]
    return max(found, key=lambda job: int(job.partition("_")[0]), default=None)
