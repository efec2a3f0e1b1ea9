"""The pictures of a run: its curves, the confusion matrix and the most confident mistakes. Rank zero only."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from dist_train.data.sets.image_set import Examples
from dist_train.distributed.import_lock import IMPORT_LOCK
from dist_train.distributed.peer_failures import first_line
from dist_train.models.tasks.confusion import accuracy_by_class
from dist_train.runs.directory import RunDir
from dist_train.runs.reports import charts
from dist_train.runs.reports.compare import read_run
from dist_train.training.final_evaluation import FinalEvaluation

_log = logging.getLogger(__name__)


class Pictures:
    """Draws the pictures of a run, as little as possible of it after the result.

    The constructor starts a thread that imports matplotlib while training runs.
    """

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pictures")
        self._thread.submit(_warm_up)

    def begin(self) -> None:
        """Draw the curves in the thread: all lines that they show are written."""
        self._curves = self._thread.submit(_draw_curves, self._run_dir)

    def finish(self, final: FinalEvaluation) -> dict[str, bytes]:
        """Write the pictures to the run directory and return the PNGs by name, after `begin`. Never fails a run."""
        run_dir = self._run_dir
        functions: dict[str, Callable[[], bytes | None]] = {
            "curves": self._curves.result,
            "confusion": lambda: _draw_confusion(final, run_dir),
            "mistakes": lambda: _draw_mistakes(final, run_dir),
        }
        pictures = {}
        for name, draw_one in functions.items():
            try:
                picture = draw_one()
            except Exception as error:  # also from user code, which returns the examples
                _log.warning("no picture of the %s: %s", name, first_line(error))
                continue
            if picture is not None:
                pictures[name] = picture
        run_dir.write_pictures(pictures)
        return pictures


def _warm_up() -> None:
    with IMPORT_LOCK:
        charts.warm_up()


def _draw_curves(run_dir: RunDir) -> bytes:
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
