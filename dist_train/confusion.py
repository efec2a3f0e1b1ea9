"""What a classifier takes for what, over a whole split: the counts behind its accuracy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_train.distributed import World

_MOST = 2048  # classes; their counts take 32 MiB


class Confusion:
    """Counted where the work is, as an evaluation goes over its batches. Empty if the net is no classifier of ours."""

    def __init__(self) -> None:
        self._counts: Tensor | None = None  # int64 [K, K], this rank's

    def note(self, output: Tensor, targets: Tensor) -> None:
        """Logits [B, K] and labels [B] of one more batch."""
        classes = output.shape[1]
        if classes > _MOST:
            return
        if self._counts is None:
            self._counts = torch.zeros(classes * classes, dtype=torch.int64, device=output.device)
        labels = targets.long()
        cells = labels * classes + output.argmax(dim=1)
        # A net with a loss of its own may have labels that stand for no class.
        self._counts += torch.bincount(cells[(labels >= 0) & (labels < classes)], minlength=classes * classes)

    def total(self, world: World) -> Tensor | None:
        """int64 [K, K] over all ranks: how many examples of a class (row) were taken for another (column).

        Collective: every rank must call this.
        """
        # Rank zero always has examples; another may have none.
        size = world.from_rank_zero(0 if self._counts is None else len(self._counts))
        if not size:
            return None
        mine = torch.zeros(size, dtype=torch.int64, device=world.device) if self._counts is None else self._counts
        classes = round(size**0.5)
        return world.all_reduce(mine).view(classes, classes).cpu()


def class_names(known: Sequence[str] | None, count: int) -> list[str]:
    """Those of the data set, if they are as many as the net tells apart; else numbers."""
    return list(known) if known is not None and len(known) == count else [str(number) for number in range(count)]


def accuracy_by_class(counts: Tensor) -> list[float | None]:
    """[K], of int64 [K, K]; None for a class without examples."""
    right, seen = counts.diagonal().tolist(), counts.sum(dim=1).tolist()
    return [hits / total if total else None for hits, total in zip(right, seen, strict=True)]
