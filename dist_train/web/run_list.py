"""What the list of runs shows: filtered, sorted, one page of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_train.launch.job_queue import in_order, places
from dist_train.launch.jobs import is_waiting
from dist_train.launch.slurm.commands import Job
from dist_train.runs.summary import NOT_BEGUN
from dist_train.web.run_index import Entry, Listing
from dist_train.web.site import whole_number

PER_PAGE = 100
_BUSY = ("train", "data", "evaluate", "save")  # uses of time that repeat with the steps


@dataclass(frozen=True)
class Query:
    """What a visitor wants to see of the list."""

    text: str = ""  # words that the name or a state holds
    state: str = ""
    sort: str = "newest"
    page: int = 1

    @classmethod
    def of(cls, parameters: Mapping[str, str]) -> Query:
        """Read the parameters of a URL; what makes no sense counts as not given."""
        sort = parameters.get("sort", "")
        return cls(
            text=parameters.get("q", "").strip(),
            state=parameters.get("state", "").upper(),
            sort=sort if sort in SORTS else "newest",
            page=max(1, whole_number(parameters.get("page", ""), digits=6) or 1),
        )


@dataclass(frozen=True)
class Row:
    """A run in the list."""

    entry: Entry
    state: str  # of its summary, or QUEUED: also in Slurm's queue
    left_s: float | None  # seconds to go, as far as the steps so far tell
    place: int | None = None  # in the queue of its machine

    @property
    def is_active(self) -> bool:
        return self.entry.summary.may_be_running or self.state == "QUEUED"

    @property
    def may_stop(self) -> bool:
        return self.is_active and not self.may_take_back

    @property
    def may_resume(self) -> bool:
        return not self.is_active and self.state not in ("FINISHED", *NOT_BEGUN)

    @property
    def may_queue(self) -> bool:
        return self.state == "CREATED"

    @property
    def may_take_back(self) -> bool:
        return self.entry.summary.state == "QUEUED"

    @property
    def may_delete(self) -> bool:
        return not self.is_active or self.may_take_back

    @property
    def train_loss(self) -> float | None:
        return self.entry.summary.metrics.get("train/loss")


@dataclass(frozen=True)
class JobsPage:
    rows: list[Row]
    states: list[str]  # that occur
    running: int
    queued: int
    total: int
    matching: int
    first: int  # number of the first row, from 1
    pages: int


SORTS: dict[str, Callable[[Row], Any]] = {
    "newest": lambda row: -row.entry.started,
    "name": lambda row: row.entry.name,
    "state": lambda row: row.state,
    "progress": lambda row: -(row.entry.summary.progress or 0.0),
    "accuracy": lambda row: -_or_low(row.entry.summary.accuracy),
    "loss": lambda row: math.inf if row.train_loss is None else row.train_loss,
    "speed": lambda row: -_or_low(row.entry.summary.samples_per_s),
}


def make_row(entry: Entry, job: Job | None, place: int | None = None) -> Row:
    summary = entry.summary
    state = "QUEUED" if not summary.may_be_running and is_waiting(job) else summary.state
    return Row(entry, state, _left_s(entry) if summary.is_live else None, place)


def make_page(listing: Listing, jobs: Mapping[str, Job], query: Query) -> JobsPage:
    """Return one page of the list: runs at work first, then in the order asked for."""
    place = places(in_order(entry.summary for entry in listing.entries.values()))
    rows = [
        make_row(entry, jobs.get(entry.summary.job or ""), place.get(name)) for name, entry in listing.entries.items()
    ]
    matching = [row for row in rows if _matches(row, query)]
    matching.sort(key=lambda row: (not row.is_active, SORTS[query.sort](row), row.entry.name))
    pages = max(1, math.ceil(len(matching) / PER_PAGE))
    start = (min(query.page, pages) - 1) * PER_PAGE
    return JobsPage(
        rows=matching[start : start + PER_PAGE],
        states=sorted({row.state for row in rows}),
        running=sum(row.entry.summary.may_be_running for row in rows),
        queued=sum(row.state == "QUEUED" for row in rows),
        total=len(rows),
        matching=len(matching),
        first=start + 1,
        pages=pages,
    )


def _matches(row: Row, query: Query) -> bool:
    words: Sequence[str] = query.text.lower().split()
    return (not query.state or row.state == query.state) and all(
        word in row.entry.name.lower() or word == row.state.lower() for word in words
    )


def _left_s(entry: Entry) -> float | None:
    """Estimate the seconds to go from the time that the steps so far took."""
    summary = entry.summary
    if not summary.total_steps or not summary.step:
        return None
    seconds = summary.seconds
    return (summary.total_steps - summary.step) * sum(seconds.get(use, 0.0) for use in _BUSY) / summary.step


def _or_low(value: float | None) -> float:
    return -math.inf if value is None else value
