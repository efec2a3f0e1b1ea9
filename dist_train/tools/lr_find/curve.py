"""The loss of a range test by learning rate: smoothed, where it diverged, and where it falls fastest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

_DIVERGED = 4  # times the lowest loss, as in fastai and Lightning


@dataclass(frozen=True)
class Curve:
    """One point for each step."""

    rates: list[float]  # learning rates, each the same factor above the one before
    losses: list[float]  # before the update with that rate
    steps: int  # that the whole range takes; fewer points if the loss diverged

    @cached_property
    def smoothed(self) -> list[float]:
        """The mean of each loss and its neighbours, 4 % of the steps on either side."""
        reach = max(1, self.steps // 25)
        windows = (self.losses[max(0, at - reach) : at + reach + 1] for at in range(len(self.losses)))
        return [sum(window) / len(window) for window in windows]

    @property
    def has_diverged(self) -> bool:
        """Whether the last smoothed loss is not finite, or more than four times the lowest."""
        lowest, last = min(self.smoothed), self.smoothed[-1]
        return not math.isfinite(last) or last > lowest + (_DIVERGED - 1) * abs(lowest)

    @property
    def _lowest(self) -> int:
        return min(range(len(self.smoothed)), key=self.smoothed.__getitem__)

    @property
    def lowest(self) -> float:
        """The rate at which the smoothed loss is lowest."""
        return self.rates[self._lowest]

    @property
    def steepest(self) -> float | None:
        """The rate at which the smoothed loss falls fastest, on its way to the lowest; None if it does not fall.

        A fall of less than three times the mean distance of the losses to the smoothed ones may be chance.
        """
        loss, lowest = self.smoothed, self._lowest
        distances = [abs(self.losses[at] - loss[at]) for at in range(lowest)]
        if lowest < 2 or loss[0] - loss[lowest] <= 3 * sum(distances) / lowest:
            return None
        return self.rates[max(range(1, lowest), key=lambda at: loss[at - 1] - loss[at + 1])]
