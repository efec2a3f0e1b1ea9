"""A median with its confidence interval."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb


@dataclass(frozen=True)
class Interval:
    """A median with an interval that holds the true median with at least 95 % (the full range below six values)."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Compute it from order statistics alone, since times are not normally distributed."""
        ordered, n = sorted(values), len(values)
        outside = 0  # values left out at each end: a binomial tail of at most 2.5 %
        while sum(comb(n, k) for k in range(outside + 1)) / 2**n <= 0.025:
            outside += 1
        outside = max(0, outside - 1)
        return cls(statistics.median(ordered), ordered[outside], ordered[n - 1 - outside])

    def text(self, unit: str = "", digits: int = 2) -> str:
        """Format it as in `1.52x (1.41 to 1.60)`."""
        return f"{self.median:,.{digits}f}{unit} ({self.low:,.{digits}f} to {self.high:,.{digits}f})"
