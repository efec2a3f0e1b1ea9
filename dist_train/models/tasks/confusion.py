"""Confusion matrix of a classifier over a whole split, and its most confident mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from dist_train.distributed.world import World

_MAX_CLASSES = 2048  # the counts of so many classes take 32 MiB


@dataclass(frozen=True)
class Mistake:
    """A misclassified example."""

    index: int  # in its split
    label: int
    prediction: int
    probability: float  # the net's probability of the prediction


class Confusion:
    """Confusion counts, collected on the device during an evaluation. Empty if no batch is added."""

    def __init__(self, most_mistakes: int = 0) -> None:
        """`most_mistakes`: how many mistakes to keep, those with the highest probability."""
        self._most_mistakes = most_mistakes
        self._mistakes: list[Mistake] = []  # this rank's
        self._counts: Tensor | None = None  # int64 [K, K], this rank's

    def add(self, output: Tensor, targets: Tensor, indices: Tensor) -> None:
        """Add a batch: logits [B, K], labels [B] and indices in the split [B]."""
        classes = output.shape[1]
        if classes > _MAX_CLASSES:
            return
        if self._counts is None:
            self._counts = torch.zeros(classes * classes, dtype=torch.int64, device=output.device)
        labels = targets.long()
        cells = labels * classes + output.argmax(dim=1)
        # With its own loss, a net may have labels that are not class indices.
        valid = (labels >= 0) & (labels < classes)
        self._counts += torch.bincount(cells[valid], minlength=classes * classes)
        if self._most_mistakes and len(indices) == len(output):  # they differ if an example has several outputs
            self._add_mistakes(output.softmax(dim=1, dtype=torch.float32), torch.where(valid, labels, -1), indices)

    def _add_mistakes(self, probabilities: Tensor, labels: Tensor, indices: Tensor) -> None:
        scores, predictions = probabilities.max(dim=1)
        scores = torch.where((labels >= 0) & (predictions != labels), scores.nan_to_num(-1), -1)
        # A stable sort keeps the first of equal scores, for any number of ranks.
        scores, order = scores.sort(descending=True, stable=True)
        rows = order[: self._most_mistakes]
        worst = zip(indices[rows.cpu()].tolist(), labels[rows].tolist(), predictions[rows].tolist(), scores.tolist(),
                    strict=False)  # fmt: skip
        self._keep([*self._mistakes, *(Mistake(*each) for each in worst if each[-1] >= 0)])

    def _keep(self, mistakes: Sequence[Mistake]) -> None:
        self._mistakes = sorted(mistakes, key=lambda each: (-each.probability, each.index))[: self._most_mistakes]

    def mistakes(self, world: World) -> list[Mistake]:
        """Return the most confident mistakes over all ranks.

        Collective: every rank must call this.
        """
        self._keep([*chain(*world.gather(self._mistakes))])
        return self._mistakes

    def total(self, world: World) -> Tensor | None:
        """Return the counts over all ranks, int64 [K, K]: rows are labels, columns are predictions.

        Collective: every rank must call this.
        """
        # Rank zero always has examples; other ranks may have none.
        size = world.from_rank_zero(0 if self._counts is None else len(self._counts))
        if not size:
            return None
        mine = torch.zeros(size, dtype=torch.int64, device=world.device) if self._counts is None else self._counts
        classes = round(size**0.5)
        return world.all_reduce(mine).view(classes, classes).cpu()


def class_names(known: Sequence[str] | None, count: int) -> list[str]:
    """Return the names in `known` if they are unique and there are `count` of them, else the numbers as text."""
    usable = known is not None and len(known) == len(set(known)) == count
    return list(known) if known is not None and usable else [str(number) for number in range(count)]


def accuracy_by_class(counts: Tensor) -> list[float | None]:
    """Return K accuracies from counts, int64 [K, K]; None for a class without examples."""
    correct, seen = counts.diagonal().tolist(), counts.sum(dim=1).tolist()
    return [hits / total if total else None for hits, total in zip(correct, seen, strict=True)]
