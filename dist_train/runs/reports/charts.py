"""Charts: learning curves of runs, and the confusion matrix and mistakes of a classifier."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

from dist_train.errors import DistTrainError
from dist_train.runs.reports.compare import Axis, LoadedRun, group_seeds

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

AXES: tuple[Axis, ...] = get_args(Axis)
_PANELS = ("val/accuracy", "val/loss", "train/loss")
_AXIS_LABELS = {"step": "step", "samples": "training examples", "seconds": "seconds of run time"}
_MAX_LEGEND = 12  # experiments; further ones have a colour but no legend entry
_MAX_COUNTS, _MAX_NAMES = 20, 60  # classes; with more of them, counts and names would not be readable
_PER_ROW = 6  # mistakes


def learning_curves(runs: Sequence[LoadedRun], axis: Axis = "step") -> bytes:
    """Draw a PNG with a panel for each metric and a colour for each experiment: seeds thin, their mean bold.

    Raises:
        DistTrainError: matplotlib is not installed.
    """
    panels = [key for key in _PANELS if any(run.curve(key, axis)[0] for run in runs)] or [_PANELS[0]]
    figure = _figure(4.6 * len(panels), 3.6)
    from matplotlib.ticker import LogLocator

    groups = group_seeds(runs)
    for key, panel in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        for number, group in enumerate(groups):
            _draw(panel, group, key, axis, f"C{number % 10}")
        panel.set_title(key)
        panel.set_xlabel(_AXIS_LABELS[axis])
        panel.grid(alpha=0.3)
        if key.endswith("loss") and all(value > 0 for run in runs for value in run.curve(key, axis)[1]):
            panel.set_yscale("log")
            panel.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")  # 0.1 instead of 10^-1
            panel.yaxis.set_minor_formatter("{x:g}")
    by_label: dict[str, Any] = {}
    for panel in figure.axes:
        handles, labels = panel.get_legend_handles_labels()
        by_label |= dict(zip(labels, handles, strict=True))
    if by_label:
        labels = [*by_label][:_MAX_LEGEND]
        figure.legend([by_label[label] for label in labels], labels, loc="outside lower center",
                      ncols=min(3, len(labels)), fontsize="small")  # fmt: skip
    return _png(figure)


def _draw(panel: Any, group: Sequence[LoadedRun], key: str, axis: Axis, colour: str) -> None:
    """Draw the runs of one experiment and, where it is defined, their mean."""
    curves = [curve for run in group if (curve := run.curve(key, axis))[0]]
    name = _label(group[0].name) if len(group) == 1 else f"{_label(group[0].name)} ({len(group)} runs)"
    line = {"linewidth": 2.0} if len(curves) == 1 else {"linewidth": 0.8, "alpha": 0.5}
    # The mean exists where all runs have values. On an axis of seconds, two runs share a value only by chance.
    common = sorted(set.intersection(*(set(x) for x, _ in curves))) if len(curves) > 1 and axis != "seconds" else []
    if len(common) > 1:
        values = [dict(zip(x, y, strict=True)) for x, y in curves]
        mean = [sum(each[x] for each in values) / len(values) for x in common]
        panel.plot(common, mean, color=colour, linewidth=2, label=name)
    for number, (x, y) in enumerate(curves):
        marker = "." if len(x) == 1 else ""
        label = name if number == 0 and len(common) < 2 else None
        panel.plot(x, y, color=colour, marker=marker, label=label, **line)


def confusion_matrix(
    counts: Sequence[Sequence[int]], accuracies: Sequence[float | None], classes: Sequence[str], title: str
) -> bytes:
    """Draw a PNG: the share of each class (row) predicted as each class (column), and the accuracy of each class.

    Raises:
        DistTrainError: matplotlib is not installed.
    """
    number = len(classes)
    side = min(4.0 + 0.32 * number, 12.0)  # inches
    figure = _figure(1.6 * side, side + 0.5)
    matrix, dots = figure.subplots(1, 2, width_ratios=[3, 1], sharey=True)
    shares = [[count / total for count in row] for row in counts if (total := sum(row) or 1)]
    from matplotlib.colors import PowerNorm

    scale = PowerNorm(0.4, vmin=0, vmax=1)  # makes one mistake in a thousand visible
    matrix.imshow(shares, cmap="Blues", norm=scale, aspect="auto")
    if number <= _MAX_COUNTS:
        for label, row in enumerate(counts):
            for predicted, count in enumerate(row):
                colour = "white" if scale(shares[label][predicted]) > 0.6 else "black"
                if count:
                    matrix.text(predicted, label, f"{count}", ha="center", va="center", fontsize="small", color=colour)
    matrix.set_xlabel("predicted")
    matrix.set_ylabel("class")
    dots.plot([math.nan if each is None else each for each in accuracies], range(number), "o")
    dots.set_xlabel("accuracy")
    dots.locator_params(axis="x", nbins=3)
    dots.grid(alpha=0.3)
    ticks = range(number) if number <= _MAX_NAMES else ()
    names = [_label(name, 16) for name in classes] if ticks else []
    matrix.set_xticks(ticks, names, rotation=90 if max(map(len, names), default=0) > 3 else 0)
    matrix.set_yticks(ticks, names)
    figure.suptitle(_label(title))
    return _png(figure)


def mistakes(
    pictures: Sequence[np.ndarray[Any, Any]], predictions: Sequence[tuple[str, str, float]], title: str
) -> bytes:
    """Draw a PNG with a grid of pictures (uint8 [H, W, C] or [H, W]), each with class, prediction and confidence.

    Raises:
        DistTrainError: matplotlib is not installed.
    """
    rows = -(-len(pictures) // _PER_ROW)
    figure = _figure(1.8 * _PER_ROW, 2.2 * rows + 0.4)
    panel = figure.subplots()  # one for all pictures: thirty panels take a second
    panel.set_axis_off()
    panel.set_aspect("equal")
    for number, (picture, (label, predicted, confidence)) in enumerate(zip(pictures, predictions, strict=True)):
        row, column = divmod(number, _PER_ROW)
        height, width = (side / max(picture.shape[:2]) for side in picture.shape[:2])
        left, bottom = 1.05 * column, -1.3 * row
        panel.imshow(picture, cmap="gray", vmin=0, vmax=255, extent=(left, left + width, bottom, bottom + height))
        caption = f"{_label(label, 12)}, predicted\n{_label(predicted, 12)} ({confidence:.0%})"
        panel.text(left + width / 2, bottom + height + 0.03, caption, fontsize="small", ha="center", va="bottom")
    panel.set_xlim(0, 1.05 * _PER_ROW - 0.05)
    panel.set_ylim(-1.3 * (rows - 1), 1.25)
    figure.suptitle(_label(title))
    return _png(figure)


def _label(text: str, length: int = 80) -> str:
    """Truncate to `length` characters and escape dollar signs, which start formulas in matplotlib."""
    return (text if len(text) <= length else f"{text[: length - 1]}…").replace("$", r"\$")


def _figure(width: float, height: float) -> Figure:
    """Return a figure of this size in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DistTrainError('Pictures need matplotlib: pip install "dist-train[plot]".') from None
    return Figure(figsize=(width, height), layout="constrained", dpi=120)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
