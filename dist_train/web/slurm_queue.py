"""What Slurm says of the jobs of runs, asked in the background: a page never waits for the controller."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

from dist_train.errors import LaunchError
from dist_train.launch.slurm import commands
from dist_train.launch.slurm.commands import Job
from dist_train.runs.summary import Summary

_EVERY_S = 10.0


class SlurmQueue:
    """The last answer of Slurm. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked = -_EVERY_S
        self._jobs: dict[str, Job] = {}
        self._error: str | None = None
        self._number = 0

    def jobs(self, runs: Iterable[Summary]) -> dict[str, Job]:
        """Return the jobs of unfinished runs by id, as of the last answer; asks again if that is old."""
        ids = sorted({run.job for run in runs if run.job and run.state != "FINISHED"})
        with self._lock:
            if ids and time.monotonic() - self._asked >= _EVERY_S:
                self._asked = time.monotonic()
                threading.Thread(target=self._ask, args=(ids,), name="slurm_queue", daemon=True).start()
            return self._jobs

    @property
    def version(self) -> int:
        """A number that changes with the answer."""
        return self._number

    @property
    def error(self) -> str | None:
        """Why the last question had no answer."""
        return self._error

    def _ask(self, ids: list[str]) -> None:
        before = self._jobs, self._error
        try:
            self._jobs, self._error = commands.jobs(ids), None
        except LaunchError as error:
            self._error = str(error)
        self._number += (self._jobs, self._error) != before
