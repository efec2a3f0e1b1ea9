"""What the wall seconds of a run went into, over all its attempts; and how much of them was progress.

The share that counts is the effective training time ratio of Kokolis et al. (arXiv 2410.21680): seconds of steps that
were new, by all seconds since the run was first started or queued.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Literal, get_args

# again: steps that a former attempt had done after its last checkpoint; down: between attempts, and in the queue.
Use = Literal["train", "again", "data", "evaluate", "save", "start", "down"]


class TimeAccounting:
    """One clock with a column for each use; it always runs, for one of them."""

    def __init__(self, before: Mapping[str, float], down_s: float, reached: int, started: float) -> None:
        """`before`: the sheet of the former attempts, which had come to step `reached`; `down_s` passed since.

        `started`: time.perf_counter() when the process began.
        """
        self._seconds: dict[str, float] = {use: float(before.get(use, 0.0)) for use in get_args(Use)}
        self._seconds["down"] += max(0.0, down_s)  # a clock may have been set back
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
        """So many steps are done; since this attempt began `data_wait_s` of them were waiting for data."""
        self._step = step
        waited, self._waited_s = data_wait_s - self._waited_s, data_wait_s
        if self._use in ("train", "again"):
            self._seconds[self._use] -= waited
            self._seconds["data"] += waited
            self.switch_to("train")

    def totals(self) -> dict[str, float]:
        """Seconds by use, up to now."""
        self.switch_to(self._use)
        return {use: round(seconds, 3) for use, seconds in self._seconds.items()}


def effective_ratio(seconds: Mapping[str, float]) -> float:
    """New steps' share of all seconds. Waiting for data is none of it."""
    total = sum(seconds.values())
    return seconds.get("train", 0.0) / total if total else 0.0
