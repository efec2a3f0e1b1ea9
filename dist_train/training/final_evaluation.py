"""The final evaluation of a run: exact passes over test and train, and pictures of the mistakes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_train.data.sets.image_set import Examples
from dist_train.data.splits import Splits
from dist_train.distributed.peer_failures import first_line
from dist_train.distributed.world import World
from dist_train.models.tasks.confusion import Confusion, Mistake, accuracy_by_class, class_names
from dist_train.runs.directory import RunDir
from dist_train.runs.reports import charts
from dist_train.runs.reports.compare import read_run

_log = logging.getLogger(__name__)

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


def draw(final: FinalEvaluation, run_dir: RunDir) -> dict[str, bytes]:
    """Write the pictures to the run directory and return the PNGs by name. Never fails a run. Rank zero only."""
    functions = {"curves": _draw_curves, "confusion": _draw_confusion, "mistakes": _draw_mistakes}
    pictures = {}
    for name, draw_one in functions.items():
        try:
            picture = draw_one(final, run_dir)
        except Exception as error:  # also from user code, which returns the examples
            _log.warning("no picture of the %s: %s", name, first_line(error))
            continue
        if picture is not None:
            pictures[name] = picture
    run_dir.write_pictures(pictures)
    return pictures


def _draw_curves(_: FinalEvaluation, run_dir: RunDir) -> bytes:
    return charts.learning_curves([read_run(run_dir.path)])


def _draw_confusion(final: FinalEvaluation, run_dir: RunDir) -> bytes | None:
    if final.confusion is None:
        return None
    title = f"{run_dir.path.name}: {final.split} accuracy {final.metrics[f'{final.split}/accuracy']:.2%}"
    counts = final.confusion.tolist()
    return charts.confusion_matrix(counts, accuracy_by_class(final.confusion), final.classes, title)


def _draw_mistakes(final: FinalEvaluation, run_dir: RunDir) -> bytes | None:
    shown = [(each, _pixels(final.examples, each.index)) for each in final.mistakes]
    grid = [(each, pixels.numpy()) for each, pixels in shown if pixels is not None]
    if not grid:
        return None
    labels = [(final.classes[each.label], final.classes[each.prediction], each.probability) for each, _ in grid]
    title = f"{run_dir.path.name}: the most confident mistakes on {final.split}"
    return charts.mistakes([pixels for _, pixels in grid], labels, title)


def _pixels(examples: Examples | None, index: int) -> Tensor | None:
    """Return the image as uint8 [H, W, C], or [H, W] if it is grey; None if the example is not an image."""
    example = examples[index] if examples is not None else None
    image = example[0] if isinstance(example, (tuple, list)) else None
    if not isinstance(image, Tensor) or image.ndim != 3 or len(image) not in (1, 3):
        return None
    if image.dtype != torch.uint8:  # the output of the user's transforms
        image = image.float().nan_to_num()
        low, high = image.min(), image.max()
        image = (255 * (image - low) / (high - low).clamp(min=1e-9)).to(torch.uint8)
    return image[0] if len(image) == 1 else image.permute(1, 2, 0)
