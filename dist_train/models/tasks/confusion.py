"""What a classifier takes for what, over a whole split: the counts behind its accuracy, and its worst mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from dist_train.distributed.world import World

_MOST = 2048  # classes; their counts take 32 MiB


@dataclass(frozen=True)
class Mistake:
    """An example that was taken for another class."""

    index: int  # in its split
    label: int
    prediction: int
    probability: float  # of the prediction, as the net sees it


class Confusion:
    """Counted where the work is, as an evaluation goes over its batches. Empty if the net is no classifier of ours."""

    def __init__(self, most_mistakes: int = 0) -> None:
        """`most_mistakes`: so many are kept, those that the net is surest of."""
        self._most_mistakes = most_mistakes
        self._mistakes: list[Mistake] = []  # this rank's
        self._counts: Tensor | None = None  # int64 [K, K], this rank's

    def note(self, output: Tensor, targets: Tensor, indices: Tensor) -> None:
        """Logits [B, K], labels [B] and places in the split [B] of one more batch."""
        classes = output.shape[1]
        if classes > _MOST:
            return
        if self._counts is None:
            self._counts = torch.zeros(classes * classes, dtype=torch.int64, device=output.device)
        labels = targets.long()
        cells = labels * classes + output.argmax(dim=1)
        # A net with a loss of its own may have labels that stand for no class.
        known = (labels >= 0) & (labels < classes)
        self._counts += torch.bincount(cells[known], minlength=classes * classes)
        if self._most_mistakes and len(indices) == len(output):  # not so where an example has several outputs
            self._note_mistakes(output.softmax(dim=1, dtype=torch.float32), torch.where(known, labels, -1), indices)

    def _note_mistakes(self, probabilities: Tensor, labels: Tensor, indices: Tensor) -> None:
        sure, predictions = probabilities.max(dim=1)
        sure = torch.where((labels >= 0) & (predictions != labels), sure.nan_to_num(-1), -1)
        # Stable: of equal ones the first, for any number of ranks.
        sure, order = sure.sort(descending=True, stable=True)
        rows = order[: self._most_mistakes]
        found = zip(indices[rows.cpu()].tolist(), labels[rows].tolist(), predictions[rows].tolist(), sure.tolist(),
                    strict=False)  # fmt: skip
        self._keep([*self._mistakes, *(Mistake(*each) for each in found if each[-1] >= 0)])

    def _keep(self, mistakes: Sequence[Mistake]) -> None:
        self._mistakes = sorted(mistakes, key=lambda each: (-each.probability, each.index))[: self._most_mistakes]

    def mistakes(self, world: World) -> list[Mistake]:
        """Those of all ranks that the net was surest of.

        Collective: every rank must call this.
        """
        self._keep([*chain(*world.gather(self._mistakes))])
        return self._mistakes

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
    """Those of the data set, if they are as many as the net tells apart, and each another; else numbers."""
    fit = known is not None and len(known) == len(set(known)) == count
    return list(known) if known is not None and fit else [str(number) for number in range(count)]


def accuracy_by_class(counts: Tensor) -> list[float | None]:
    """[K], of int64 [K, K]; None for a class without examples."""
    right, seen = counts.diagonal().tolist(), counts.sum(dim=1).tolist()
    return [hits / total if total else None for hits, total in zip(right, seen, strict=True)]
