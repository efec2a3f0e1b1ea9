"""Measurements in turns, each announced: what is measured now, and how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Round: TypeAlias = dict[str, Any]  # measurement -> what it found


@dataclass(frozen=True)
class Series:
    """Each round makes every measurement once, so that a slow minute of the machine hits all of them."""

    name: str
    measurements: Mapping[str, Callable[[], Any]]
    rounds: int
    typical_s: float  # of one measurement, on two CPU cores


class TimeEstimate:
    """Runs series and says before each measurement how long it and the ones after it will take.

    Until a measurement has been made, it counts with its typical seconds times the pace of this machine so far.
    """

    def __init__(self, series: Sequence[Series], say: Callable[[str], object]) -> None:
        self._say = say
        self._to_come = [(each, name) for each in series for _ in range(each.rounds) for name in each.measurements]
        self._total = len(self._to_come)
        self._last_s: dict[tuple[str, str], float] = {}
        self._took_s = self._typical_s = 0.0

    def run(self, series: Series) -> list[Round]:
        """What each round found. Series are run in the order in which they were given to the outlook."""
        found: list[Round] = []
        for number in range(series.rounds):
            found.append({})
            for name, measure in series.measurements.items():
                self._say(
                    f"{series.name}, round {number + 1} of {series.rounds}: {name}; "
                    f"{self._total - len(self._to_come) + 1} of {self._total}, about {in_words(self.left_s())} left"
                )
                began = time.perf_counter()
                found[-1][name] = measure()
                self._note(series, name, time.perf_counter() - began)
        return found

    def left_s(self) -> float:
        """Seconds until all measurements that are to come are made."""
        pace = self._took_s / self._typical_s if self._typical_s else 1.0
        return sum(self._last_s.get((series.name, name), series.typical_s * pace) for series, name in self._to_come)

    def _note(self, series: Series, name: str, seconds: float) -> None:
        del self._to_come[0]
        self._last_s[series.name, name] = seconds
        self._took_s += seconds
        self._typical_s += series.typical_s


def in_words(seconds: float) -> str:
    """As one reads it: "40 s", "12 min", "1 h 30 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
