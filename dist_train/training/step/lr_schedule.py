"""The learning rate as a function of the step. Its names are `ScheduleName` in config/schema.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import assert_never

from dist_train.config.schema import ScheduleName


@dataclass(frozen=True)
class LearningRate:
    """The learning rate as a pure function of the step: nothing to save, nothing to replay on resume."""

    peak: float
    total_steps: int
    name: ScheduleName = "constant"
    warmup_steps: int = 0
    final_ratio: float = 0.0  # relative to the peak, reached at the last step; unused by constant

    def at(self, step: int) -> float:
        """Return the learning rate of update number `step` (from 0).

        `one_cycle` is that of torch.optim.lr_scheduler.OneCycleLR (two cosines; starts at peak / 25, ends at
        peak / 250 000). It rises for `warmup_steps`, or for 30 % of the run.
        """
        if self.name == "one_cycle":
            return self._one_cycle(step)
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.name == "constant":
            return self.peak
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        if self.name == "cosine":
            fall = 0.5 * (1 + math.cos(math.pi * done))
        elif self.name == "linear":
            fall = 1 - done
        else:
            assert_never(self.name)
        return self.peak * (self.final_ratio + (1 - self.final_ratio) * fall)

    def _one_cycle(self, step: int) -> float:
        start, end = self.peak / 25, self.peak / 25e4
        top = (self.warmup_steps or 0.3 * self.total_steps) - 1
        if step < top:
            return _cosine(start, self.peak, step / top)
        return _cosine(self.peak, end, (step - top) / max(1.0, self.total_steps - 1 - top))


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))
