"""What Slurm says of the jobs of runs, asked in the background: a page never waits for the controller."""

from __future__ import annotations

from collections.abc import Iterable

from dist_train.errors import LaunchError
from dist_train.launch.slurm import commands
from dist_train.launch.slurm.commands import Job
from dist_train.runs.summary import Summary
from dist_train.web.background import Background

_EVERY_S = 10.0

_Answer = tuple[dict[str, Job], str | None]  # and why there was none


class SlurmQueue:
    """The last answer of Slurm. Safe to use from several threads."""

    def __init__(self) -> None:
        self._background = Background[_Answer](_ask, ({}, None), _EVERY_S)

    def jobs(self, runs: Iterable[Summary]) -> dict[str, Job]:
        """Return the jobs of unfinished runs by id, as of the last answer; asks again if that is old."""
        ids = sorted({run.job for run in runs if run.job and run.state != "FINISHED"})
        found, _ = self._background.latest(ids) if ids else self._background.answer
        return found

    @property
    def version(self) -> int:
        """A number that changes with the answer."""
        return self._background.version

    @property
    def error(self) -> str | None:
        """Why the last question had no answer."""
        return self._background.answer[1]


def _ask(before: _Answer, ids: list[str]) -> _Answer:
    try:
        return commands.jobs(ids), None
    except LaunchError as error:
        return before[0], str(error)
