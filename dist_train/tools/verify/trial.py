"""What the ranks of a check are told, and what they say of it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Trial:
    """Updates up to `steps`. With a `folder`: from its latest checkpoint on, and saved there after step `save_at`."""

    config: str  # a resolved YAML file
    steps: int
    folder: str = ""
    save_at: int = 0
    kill_after_s: float = 0.0  # save after each step, and so long after the first save SIGKILL


@dataclass(kw_only=True)
class Outcome:
    began_at: int = 0
    losses: list[float] = field(default_factory=list)  # of each update taken
    on_cpu: bool = True  # where a run that is resumed on as many processes is the same to the bit
    weights: str = ""  # digest
    held_still: list[str] = field(default_factory=list)
    duplicates: int = 0  # examples that the ranks together trained on twice in these steps, or would in the epoch
    epoch: tuple[int, int, int] = (0, 0, 0)  # examples seen once, dropped, in the set
    evaluated: tuple[int, int] = (0, 0)  # examples counted just once, in the split
    doubled: float = 0.0  # relative difference of the loss of a batch and of the batch twice
