"""Accounting of a run's wall time by use, over all attempts, and the share of it that was progress.

That share is the effective training time ratio of Kokolis et al. (arXiv 2410.21680): seconds of new steps, divided by
all seconds since the run was first started or queued.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Literal, get_args

# again: steps repeated because an earlier attempt did not save them; down: between attempts, and in the queue.
Use = Literal["train", "again", "data", "evaluate", "save", "start", "down"]


class TimeAccounting:
    """A clock with one counter for each use. Exactly one counter runs at any time."""

    def __init__(self, before: Mapping[str, float], down_s: float, reached: int, started: float) -> None:
        """`before`: the totals of earlier attempts, which reached step `reached`; `down_s` seconds passed since then.

        `started`: time.perf_counter() when the process started.
        """
        self._seconds: dict[str, float] = {use: float(before.get(use, 0.0)) for use in get_args(Use)}
        self._seconds["down"] += max(0.0, down_s)  # the clock may have been set back
        self._step, self._reached = 0, reached
        self._use: Use = "start"
        self._since = started
        self._waited_s = 0.0

    def switch_to(self, use: Use) -> None:
        now = time.perf_counter()
        self._seconds[self._use] += now - self._since
        self._use = "again" if use == "train" and self._step < self._reached else use
        self._since = now

    def record_step(self, step: int, data_wait_s: float) -> None:
        """Record that `step` steps are done, and that this attempt has waited `data_wait_s` for data so far."""
        self._step = step
        waited, self._waited_s = data_wait_s - self._waited_s, data_wait_s
        if self._use in ("train", "again"):
            self._seconds[self._use] -= waited
            self._seconds["data"] += waited
            self.switch_to("train")

    def totals(self) -> dict[str, float]:
        """Return the seconds by use, up to now."""
        self.switch_to(self._use)
        return {use: round(seconds, 3) for use, seconds in self._seconds.items()}


def effective_ratio(seconds: Mapping[str, float]) -> float:
    """Return the share of all seconds that went into new steps, not counting waits for data."""
    total = sum(seconds.values())
    return seconds.get("train", 0.0) / total if total else 0.0
