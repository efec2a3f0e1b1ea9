"""When things happen: durations with a unit, what is due at a step, the learning rate of a step."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from dist_train.errors import ConfigError

ScheduleName = Literal["constant", "cosine", "linear", "one_cycle"]

_UNITS = {
    **dict.fromkeys(("step", "steps"), "steps"),
    **dict.fromkeys(("epoch", "epochs"), "epochs"),
    **dict.fromkeys(("s", "sec", "second", "seconds"), "s"),
}


@dataclass(frozen=True)
class Duration:
    """A number with its unit: "3 epochs", "0.5 epochs", "600 steps", "30 s". A bare number means steps."""

    value: float
    unit: str = "steps"  # steps | epochs | s

    @classmethod
    def parse(cls, text: object) -> Duration:
        """Raises ValueError with the legal forms, so that pydantic can name the setting."""
        if isinstance(text, Duration):
            return text
        found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([a-z]*)\s*", str(text))
        unit = _UNITS.get(found[2] or "steps") if found else None
        if found is None or unit is None:
            raise ValueError('write a number and a unit: "3 epochs", "600 steps" or "30 s"')
        value = float(found[1])
        if math.isinf(value):
            raise ValueError(f"more {unit} than a number can hold")
        if unit == "steps" and not value.is_integer():
            raise ValueError(f"{value:g} steps is not a whole number of steps")
        return cls(value, unit)

    def __str__(self) -> str:
        """Reads back as the same duration: every digit, no exponent."""
        return f"{Decimal(repr(self.value)):f} {self.unit}".replace(".0 ", " ")

    def to_steps(self, steps_per_epoch: int) -> int:
        """Whole steps; a positive duration is at least one step. Seconds have no fixed number of steps."""
        if self.unit == "s":
            raise ConfigError(f'"{self}" cannot be counted in steps. Write it in steps or epochs.')
        steps = self.value * (steps_per_epoch if self.unit == "epochs" else 1)
        return max(1, round(steps)) if self.value else 0


def is_due(step: int, every: int, total_steps: int) -> bool:
    """Every `every` steps and at the end; `every` 0: only at the end. `step` counts from 1."""
    return step == total_steps or (every > 0 and step % every == 0)


@dataclass(frozen=True)
class LearningRate:
    """The learning rate as a pure function of the step: nothing to save, nothing to replay on resume."""

    peak: float
    total_steps: int
    name: ScheduleName = "constant"
    warmup_steps: int = 0
    final_ratio: float = 0.0  # of the peak, reached at the last step; constant has none

    def at(self, step: int) -> float:
        """Learning rate of the update that makes `step` (from 0) into `step + 1`.

        `one_cycle` is that of torch.optim.lr_scheduler.OneCycleLR (two cosines; start at peak / 25, end at
        peak / 250 000), its rise is `warmup_steps`, or 30 % of the run.
        """
        if self.name == "one_cycle":
            return self._one_cycle(step)
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.name == "constant":
            return self.peak
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        fall = 0.5 * (1 + math.cos(math.pi * done)) if self.name == "cosine" else 1 - done
        return self.peak * (self.final_ratio + (1 - self.final_ratio) * fall)

    def _one_cycle(self, step: int) -> float:
        start, end = self.peak / 25, self.peak / 25e4
        top = (self.warmup_steps or 0.3 * self.total_steps) - 1
        if step < top:
            return _cosine(start, self.peak, step / top)
        return _cosine(self.peak, end, (step - top) / max(1.0, self.total_steps - 1 - top))


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))
