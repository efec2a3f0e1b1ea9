"""A clock that a test sets, in the place of a module's `time`."""

from __future__ import annotations


class Clock:
    """`monkeypatch.setattr(module, "time", clock)`: all its readers say `now`."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def time(self) -> float:
        return self.now

    monotonic = perf_counter = time
