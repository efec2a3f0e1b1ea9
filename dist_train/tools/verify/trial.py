"""The input and the result of the ranks of a check."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Trial:
    """Train up to `steps`. With a `folder`: resume from its latest checkpoint, and save there after step `save_at`."""

    config: str  # a resolved YAML file
    steps: int
    folder: str = ""
    save_at: int = 0
    kill_after_s: float = 0.0  # save after each step, and SIGKILL this long after the first save


@dataclass(kw_only=True)
class Outcome:
    began_at: int = 0
    losses: list[float] = field(default_factory=list)  # one per update
    on_cpu: bool = True  # where a run resumed on as many processes is bit-identical
    weights: str = ""  # digest
    frozen: list[str] = field(default_factory=list)  # what was frozen
    replaces: bool = False  # whether an epoch may hold an example more than once
    duplicates: int = 0  # examples that all ranks together train on more often than the epoch holds them
    epoch: tuple[int, int, int] = (0, 0, 0)  # examples seen as often as the epoch holds them, not seen, in the set
    evaluated: tuple[int, int] = (0, 0)  # examples counted exactly once, in the split
    joined_batch_error: float = 0.0  # relative difference between the loss of a batch and of the batch joined to itself
