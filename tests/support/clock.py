"""A settable clock that replaces a module's `time`."""

from __future__ import annotations


class Clock:
    """A clock whose functions all return `now`; use `monkeypatch.setattr(module, "time", clock)`."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def time(self) -> float:
        return self.now

    monotonic = perf_counter = time
