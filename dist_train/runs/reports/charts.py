"""Charts: learning curves of runs, the confusion matrix and mistakes of a classifier, the loss by learning rate."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from dist_train.errors import DistTrainError
from dist_train.runs.reports.compare import Axis, LoadedRun, group_seeds

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from PIL.Image import Image

AXES: tuple[Axis, ...] = get_args(Axis)
_METRICS, _SPLITS = ("accuracy", "loss"), ("train", "val")
_LOG_FROM = 10.0  # ratio of the largest to the smallest loss from which a log axis shows more than a linear one
_AXIS_LABELS = {"step": "step", "samples": "training examples", "seconds": "seconds of run time"}
_MAX_LEGEND = 12  # entries; further experiments have a colour but no entry
_MAX_COUNTS, _MAX_NAMES = 20, 60  # classes; with more of them, counts and names would not be readable
_DPI = 120
_PER_ROW = 6  # mistakes
_PITCH = (216, 260)  # pixels from one mistake to the next, across and down; their titles take 48 of them
_SIDE, _GAP, _HEAD = 206, 6, 36  # pixels: the longer side of a mistake, below and above it, the title of the picture


def learning_curves(runs: Sequence[LoadedRun], axis: Axis = "step") -> bytes:
    """Draw a PNG with a panel for each metric, train dashed and val solid, and a colour for each experiment.

    The seeds of an experiment are thin, their mean bold. A metric that was evaluated once is a number in the legend.

    Raises:
        DistTrainError: matplotlib is not installed.
    """
    panels = [name for name in _METRICS if any(_values(runs, name, axis))] or ["loss"]
    figure = _figure(6.0 * len(panels), 4.2)
    from matplotlib.ticker import LogLocator

    groups = group_seeds(runs)
    by_label: dict[str, Any] = {}
    for name, panel in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        values = _values(runs, name, axis)
        is_share = name == "accuracy" and all(run.accuracy_is_share for run in runs)
        scale, form = (100.0, "{:.2f} %") if is_share else (1.0, "{:.4g}")
        for number, group in enumerate(groups):
            for split in _SPLITS:
                colour = f"C{number % 10}" if len(groups) > 1 else f"C{_SPLITS.index(split)}"
                curve = _Curve(f"{split}/{name}", axis, scale, form, colour, "--" if split == "train" else "-")
                _draw(panel, group, curve)
        panel.set_title("accuracy, %" if is_share else name)
        panel.set_xlabel(_AXIS_LABELS[axis])
        panel.grid(alpha=0.3)
        if name == "loss" and values and min(values) > 0 and max(values) / min(values) >= _LOG_FROM:
            panel.set_yscale("log")
            panel.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")  # 0.1 instead of 10^-1
            panel.yaxis.set_minor_formatter("{x:g}")
        handles, labels = panel.get_legend_handles_labels()
        if len(labels) > _MAX_LEGEND // 2:
            by_label |= dict(zip(labels, handles, strict=True))
        elif labels:
            panel.legend(fontsize="small")
    if by_label:
        labels = [*by_label][:_MAX_LEGEND]
        figure.legend([by_label[label] for label in labels], labels, loc="outside lower center",
                      ncols=min(3, len(labels)), fontsize="small")  # fmt: skip
    return _png(_drawn(figure))


@dataclass(frozen=True)
class _Curve:
    """What to draw of a run, and how."""

    key: str
    axis: Axis
    scale: float
    form: str  # of a single value
    colour: str
    line: str


def _values(runs: Sequence[LoadedRun], name: str, axis: Axis) -> list[float]:
    return [value for run in runs for split in _SPLITS for value in run.curve(f"{split}/{name}", axis)[1]]


def _draw(panel: Any, group: Sequence[LoadedRun], what: _Curve) -> None:
    """Draw the runs of one experiment and, where it is defined, their mean."""
    curves = [
        (x, [value * what.scale for value in y]) for x, y in (run.curve(what.key, what.axis) for run in group) if x
    ]
    split = what.key.partition("/")[0]
    name = f"{split}: {_label(group[0].name, 40)}" + (f" ({len(group)} runs)" if len(group) > 1 else "")
    style = {"color": what.colour, "linestyle": what.line}
    if curves and all(len(x) == 1 for x, _ in curves):
        mean = sum(y[0] for _, y in curves) / len(curves)
        panel.plot([], [], label=f"{name} = {what.form.format(mean)}", **style)
        return
    line = {"linewidth": 2.0} if len(curves) == 1 else {"linewidth": 0.8, "alpha": 0.5}
    # The mean exists where all runs have values. On an axis of seconds, two runs share a value only by chance.
    shared = len(curves) > 1 and what.axis != "seconds"
    common = sorted(set.intersection(*(set(x) for x, _ in curves))) if shared else []
    if len(common) > 1:
        values = [dict(zip(x, y, strict=True)) for x, y in curves]
        means = [sum(each[x] for each in values) / len(values) for x in common]
        panel.plot(common, means, linewidth=2, label=name, **style)
    for number, (x, y) in enumerate(curves):
        panel.plot(x, y, label=name if number == 0 and len(common) < 2 else None, **style, **line)


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
                    matrix.text(predicted, label, f"{count}", ha="center", va="center", fontsize="small", color=colour,
                                in_layout=False)  # fmt: skip
    matrix.set_xlabel("predicted")
    matrix.set_ylabel("class")
    dots.plot([math.nan if each is None else 100 * each for each in accuracies], range(number), "o")
    dots.set_xlabel("accuracy, %")
    dots.locator_params(axis="x", nbins=3)
    dots.grid(alpha=0.3)
    ticks = range(number) if number <= _MAX_NAMES else ()
    names = [_label(name, 16) for name in classes] if ticks else []
    matrix.set_xticks(ticks, names, rotation=90 if max(map(len, names), default=0) > 3 else 0)
    matrix.set_yticks(ticks, names)
    figure.suptitle(_label(title))
    return _png(_drawn(figure))


def mistakes(
    pictures: Sequence[np.ndarray[Any, Any]], predictions: Sequence[tuple[str, str, float]], title: str
) -> bytes:
    """Draw a PNG with a grid of pictures (uint8 [H, W, C] or [H, W]), each with class, prediction and confidence.

    Raises:
        DistTrainError: matplotlib is not installed.
    """
    width, height = _PER_ROW * _PITCH[0], -(-len(pictures) // _PER_ROW) * _PITCH[1] + _HEAD
    figure = _figure(width / _DPI, height / _DPI)
    figure.set_layout_engine("none")
    corners = []
    for number, (picture, (label, predicted, confidence)) in enumerate(zip(pictures, predictions, strict=True)):
        row, column = divmod(number, _PER_ROW)
        middle, bottom = (column + 0.5) * _PITCH[0], _HEAD + (row + 1) * _PITCH[1] - _GAP
        corners.append((round(middle - _size(picture)[0] / 2), bottom - _size(picture)[1]))
        caption = f"{_label(label, 12)}, predicted\n{_label(predicted, 12)} ({confidence:.0%})"
        above = 1 - (corners[-1][1] - _GAP) / height
        figure.text(middle / width, above, caption, fontsize="small", ha="center", va="bottom")
    figure.suptitle(_label(title), y=1 - _GAP / height, va="top")
    image = _drawn(figure)
    for picture, corner in zip(pictures, corners, strict=True):  # pasted: matplotlib takes 10 ms to draw one
        image.paste(_scaled(picture), corner)
    return _png(image)


def loss_by_rate(
    rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], marked: float | None, title: str
) -> bytes:
    """Draw a PNG with the loss of a range test by learning rate, and the rate that is suggested.

    Raises:
        DistTrainError: matplotlib is not installed.
    """
    figure = _figure(7.0, 4.2)
    panel = figure.subplots()
    panel.plot(rates, losses, ".", color="C0", alpha=0.4, label="of each step")
    panel.plot(rates, smoothed, color="C0", label="smoothed")
    if marked is not None:
        panel.axvline(marked, color="C1", label=f"falls fastest: {marked:.1e}")
    panel.set_xscale("log")
    first, lowest = losses[0], min(losses)
    if lowest < first:  # the last losses may be thousands of times higher
        panel.set_ylim(lowest - 0.1 * (first - lowest), first + 0.5 * (first - lowest))
    panel.set_xlabel("learning rate")
    panel.set_ylabel("loss")
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
    figure.suptitle(_label(title))
    return _png(_drawn(figure))


def warm_up() -> None:
    """Import what pictures need and load the fonts: the first picture takes twice as long as the next.

    Raises:
        DistTrainError: matplotlib is not installed.
    """
    figure = _figure(6.0, 4.2)
    figure.subplots().set_title("title")
    _png(_drawn(figure))


def _label(text: str, length: int = 80) -> str:
    """Truncate to `length` characters and escape dollar signs, which start formulas in matplotlib."""
    return (text if len(text) <= length else f"{text[: length - 1]}…").replace("$", r"\$")


def _figure(width: float, height: float) -> Figure:
    """Return a figure of this size in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DistTrainError('Pictures need matplotlib: pip install "dist-train[plot]".') from None
    return Figure(figsize=(width, height), layout="constrained", dpi=_DPI)


def _size(picture: np.ndarray[Any, Any]) -> tuple[int, int]:
    """Return the width and height in pixels that a mistake is shown with."""
    height, width = (max(1, round(_SIDE * pixels / max(picture.shape[:2]))) for pixels in picture.shape[:2])
    return width, height


def _scaled(picture: np.ndarray[Any, Any]) -> Image:
    """Return a mistake with the size that it is shown with; the pixels of a small one stay sharp."""
    from PIL import Image

    sharp = 3 * max(picture.shape[:2]) < _SIDE
    resampling = Image.Resampling.NEAREST if sharp else Image.Resampling.HAMMING
    return Image.fromarray(picture).convert("RGB").resize(_size(picture), resampling)


def _drawn(figure: Figure) -> Image:
    """Draw a figure once: `savefig` draws all of it twice, the first time for the layout alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels = canvas.buffer_rgba()  # type: ignore[no-untyped-call]
    return Image.frombytes("RGBA", canvas.get_width_height(), pixels).convert("RGB")


def _png(image: Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png", compress_level=1)  # in two thirds of the time, a tenth larger
    return file.getvalue()
