"""The final evaluation of a run: exact passes over test and train."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dist_train.data.sets.image_set import Examples
from dist_train.data.splits import Splits
from dist_train.distributed.world import World
from dist_train.models.tasks.confusion import Confusion, Mistake, accuracy_by_class, class_names

_NUM_MISTAKES = 30  # that are shown

Evaluate = Callable[[Examples, Confusion | None], dict[str, float] | None]


@dataclass(frozen=True, eq=False)  # == of tensors is a tensor
class FinalEvaluation:
    metrics: dict[str, float | dict[str, float | None]]  # keys test/..., train/...
    split: str  # of the fields below: test, or val if there is no test split
    examples: Examples | None
    classes: list[str]  # [K]
    confusion: Tensor | None  # int64 [K, K], as `Confusion.total`
    mistakes: list[Mistake]  # the most confident ones


def final_evaluation(splits: Splits, evaluate: Evaluate, world: World, *, with_train: bool) -> FinalEvaluation | None:
    """Evaluate on test (or val), and on train if `with_train`. Returns None if the ranks agreed to stop before the end.

    A test split that was used for validation is evaluated once more, for its counts by class.

    Collective: every rank must call this.
    """
    split, examples = ("val", splits.val) if splits.test is None else ("test", splits.test)
    confusion = Confusion(_NUM_MISTAKES)
    metrics: dict[str, float | dict[str, float | None]] = {}
    for name, part, part_confusion in (
        (split, examples, confusion),
        ("train", splits.train if with_train else None, None),
    ):
        if part is None:
            continue
        part_metrics = evaluate(part, part_confusion)
        if part_metrics is None:
            return None
        metrics |= {f"{name}/{key}": value for key, value in part_metrics.items() if math.isfinite(value)}
    counts, mistakes = confusion.total(world), confusion.mistakes(world)
    classes = class_names(splits.description["classes"], 0 if counts is None else len(counts))
    if counts is not None:
        metrics[f"{split}/accuracy_by_class"] = dict(zip(classes, accuracy_by_class(counts), strict=True))
    return FinalEvaluation(metrics, split, examples, classes, counts, mistakes)
