"""Rounds of measurements, each announced with the estimated time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Round: TypeAlias = dict[str, Any]  # measurement -> its result


@dataclass(frozen=True)
class Series:
    """Rounds that make every measurement once, so that a slow minute of the machine affects all of them."""

    name: str
    measurements: Mapping[str, Callable[[], Any]]
    rounds: int
    typical_s: float  # of one measurement, on two CPU cores


class TimeEstimate:
    """Runs series and announces each measurement with the estimated time left.

    A measurement not made yet counts with its typical seconds times the pace of this machine so far.
    """

    def __init__(self, series: Sequence[Series], say: Callable[[str], object]) -> None:
        self._say = say
        self._remaining = [(each, name) for each in series for _ in range(each.rounds) for name in each.measurements]
        self._total = len(self._remaining)
        self._last_s: dict[tuple[str, str], float] = {}
        self._took_s = self._typical_s = 0.0

    def run(self, series: Series) -> list[Round]:
        """Return the results of each round. Run series in the order in which they were given to `TimeEstimate`."""
        results: list[Round] = []
        for number in range(series.rounds):
            results.append({})
            for name, measure in series.measurements.items():
                self._say(
                    f"{series.name}, round {number + 1} of {series.rounds}: {name}; "
                    f"{self._total - len(self._remaining) + 1} of {self._total}, about {in_words(self.left_s())} left"
                )
                began = time.perf_counter()
                results[-1][name] = measure()
                self._note(series, name, time.perf_counter() - began)
        return results

    def left_s(self) -> float:
        """Return the estimated seconds until all remaining measurements are made."""
        pace = self._took_s / self._typical_s if self._typical_s else 1.0
        return sum(self._last_s.get((series.name, name), series.typical_s * pace) for series, name in self._remaining)

    def _note(self, series: Series, name: str, seconds: float) -> None:
        del self._remaining[0]
        self._last_s[series.name, name] = seconds
        self._took_s += seconds
        self._typical_s += series.typical_s


def in_words(seconds: float) -> str:
    """Format a duration as "40 s", "12 min" or "1 h 30 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
