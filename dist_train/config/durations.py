"""Durations with a unit, and whether a periodic action is due at a step."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal

from dist_train.errors import ConfigError

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
        """Parse `text`. Raises ValueError with the valid forms; pydantic adds the name of the setting."""
        if isinstance(text, Duration):
            return text
        match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([a-z]*)\s*", str(text))
        unit = _UNITS.get(match[2] or "steps") if match else None
        if match is None or unit is None:
            raise ValueError('write a number and a unit: "3 epochs", "600 steps" or "30 s"')
        value = float(match[1])
        if math.isinf(value):
            raise ValueError(f"the number of {unit} is too large for a float")
        if unit == "steps" and not value.is_integer():
            raise ValueError(f"{value:g} steps is not a whole number of steps")
        return cls(value, unit)

    def __str__(self) -> str:
        """Format so that `parse` returns the same duration: every digit, no exponent."""
        return f"{Decimal(repr(self.value)):f} {self.unit}".replace(".0 ", " ")

    def to_steps(self, steps_per_epoch: int) -> int:
        """Convert to whole steps; a positive duration is at least one step. Seconds raise ConfigError."""
        if self.unit == "s":
            raise ConfigError(f'"{self}" cannot be converted to steps. Write it in steps or epochs.')
        steps = self.value * (steps_per_epoch if self.unit == "epochs" else 1)
        return max(1, round(steps)) if self.value else 0


def is_due(step: int, every: int, total_steps: int) -> bool:
    """Return whether an action is due: every `every` steps (0: never) and at the end. `step` counts from 1."""
    return step == total_steps or (every > 0 and step % every == 0)
