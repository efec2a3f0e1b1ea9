"""What a net comes to at its run's end: exact passes over test and train, and pictures of what it gets wrong."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_train.data.sets.image_set import Examples
from dist_train.data.splits import Splits
from dist_train.distributed.world import World, first_line
from dist_train.models.tasks.confusion import Confusion, Mistake, accuracy_by_class, class_names
from dist_train.runs.directory import RunDir
from dist_train.runs.reports import charts
from dist_train.runs.reports.compare import read_run

_log = logging.getLogger(__name__)

_SHOWN = 30  # mistakes

Evaluate = Callable[[Examples, Confusion | None], dict[str, float] | None]


@dataclass(frozen=True, eq=False)  # == of tensors is a tensor
class FinalEvaluation:
    metrics: dict[str, float | dict[str, float | None]]  # keys test/..., train/...
    judged: str  # the split that the rest is of: test, or val where there is none
    examples: Examples | None
    classes: list[str]  # [K]
    confusion: Tensor | None  # int64 [K, K], as `Confusion.total`
    mistakes: list[Mistake]  # those that the net is surest of


def final_evaluation(splits: Splits, evaluate: Evaluate, world: World, *, with_train: bool) -> FinalEvaluation | None:
    """None if the ranks agreed to stop before it was done. A test split that was validated on is passed once more, for
    its classes.

    Collective: every rank must call this.
    """
    judged, examples = ("val", splits.val) if splits.test is None else ("test", splits.test)
    confusion = Confusion(_SHOWN)
    metrics: dict[str, float | dict[str, float | None]] = {}
    for name, part, counted in (
        (judged, examples, confusion),
        ("train", splits.train if with_train else None, None),
    ):
        if part is None:
            continue
        found = evaluate(part, counted)
        if found is None:
            return None
        metrics |= {f"{name}/{key}": value for key, value in found.items() if math.isfinite(value)}
    counts, mistakes = confusion.total(world), confusion.mistakes(world)
    classes = class_names(splits.description["classes"], 0 if counts is None else len(counts))
    if counts is not None:
        metrics[f"{judged}/accuracy_by_class"] = dict(zip(classes, accuracy_by_class(counts), strict=True))
    return FinalEvaluation(metrics, judged, examples, classes, counts, mistakes)


def draw(final: FinalEvaluation, run_dir: RunDir) -> dict[str, bytes]:
    """PNGs by name, which lie in the run directory then. A run does not fail for its pictures. Rank zero only."""
    wanted = {"curves": _draw_curves, "confusion": _draw_confusion, "mistakes": _draw_mistakes}
    pictures = {}
    for name, draw_one in wanted.items():
        try:
            picture = draw_one(final, run_dir)
        except Exception as error:  # of user code too, which is asked for its examples
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
    title = f"{run_dir.path.name}: {final.judged} accuracy {final.metrics[f'{final.judged}/accuracy']:.2%}"
    counts = final.confusion.tolist()
    return charts.confusion_matrix(counts, accuracy_by_class(final.confusion), final.classes, title)


def _draw_mistakes(final: FinalEvaluation, run_dir: RunDir) -> bytes | None:
    shown = [(each, _pixels(final.examples, each.index)) for each in final.mistakes]
    grid = [(each, pixels.numpy()) for each, pixels in shown if pixels is not None]
    if not grid:
        return None
    judged = [(final.classes[each.label], final.classes[each.prediction], each.probability) for each, _ in grid]
    title = f"{run_dir.path.name}: the mistakes on {final.judged} that it is surest of"
    return charts.mistakes([pixels for _, pixels in grid], judged, title)


def _pixels(examples: Examples | None, index: int) -> Tensor | None:
    """uint8 [H, W, C], or [H, W] if it is grey; None for what is no picture."""
    example = examples[index] if examples is not None else None
    image = example[0] if isinstance(example, (tuple, list)) else None
    if not isinstance(image, Tensor) or image.ndim != 3 or len(image) not in (1, 3):
        return None
    if image.dtype != torch.uint8:  # as the user's transforms have left it
        image = image.float().nan_to_num()
        low, high = image.min(), image.max()
        image = (255 * (image - low) / (high - low).clamp(min=1e-9)).to(torch.uint8)
    return image[0] if len(image) == 1 else image.permute(1, 2, 0)
