"""The steps of a run that are traced."""

from __future__ import annotations

import re
from dataclasses import dataclass

_AT_MOST = 100  # of them: a step of mlp is 5 kB in the file of each rank, one of resnet18 is 35 kB


@dataclass(frozen=True)
class ProfiledSteps:
    """`count` steps after the first `start`: "20 steps from 100" are the steps 101 to 120."""

    count: int
    start: int

    @classmethod
    def parse(cls, text: object) -> ProfiledSteps:
        """Parse `text`. Raises ValueError with the valid form; pydantic adds the name of the setting."""
        if isinstance(text, ProfiledSteps):
            return text
        match = re.fullmatch(r"\s*(\d{1,9})\s+steps?\s+from\s+(\d{1,18})\s*", str(text))
        if match is None:
            raise ValueError('write how many, and after which step: "20 steps from 100"')
        count, start = map(int, match.groups())
        if not 1 <= count <= _AT_MOST:
            raise ValueError(f"trace 1 to {_AT_MOST} steps, as all of them are kept in memory until they are written")
        return cls(count, start)

    def __str__(self) -> str:
        return f"{self.count} steps from {self.start}"

    def __contains__(self, step: int) -> bool:
        """Whether the step after the first `step` is one of them."""
        return self.start <= step < self.end

    @property
    def end(self) -> int:
        return self.start + self.count
