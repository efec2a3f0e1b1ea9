"""Learning curves of runs, as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, get_args

from dist_train.compare import Axis, Trained, group_seeds
from dist_train.errors import DistTrainError

AXES: tuple[Axis, ...] = get_args(Axis)
_PANELS = ("val/accuracy", "val/loss", "train/loss")
_NAMES = {"step": "step", "samples": "examples trained on", "seconds": "seconds, while it ran"}
_IN_LEGEND = 12  # experiments; more of them are coloured, and not named


def learning_curves(runs: Sequence[Trained], axis: Axis = "step") -> bytes:
    """A PNG: a panel for each metric that a run has, a colour for each experiment, its seeds thin and their mean bold.

    Raises:
        DistTrainError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
    except ImportError:
        raise DistTrainError('Pictures need matplotlib: pip install "dist-train[plot]".') from None

    panels = [key for key in _PANELS if any(run.curve(key, axis)[0] for run in runs)] or [_PANELS[0]]
    figure = Figure(figsize=(4.6 * len(panels), 3.6), layout="constrained", dpi=120)
    groups = group_seeds(runs)
    for key, panel in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        for number, group in enumerate(groups):
            _draw(panel, group, key, axis, f"C{number % 10}")
        panel.set_title(key)
        panel.set_xlabel(_NAMES[axis])
        panel.grid(alpha=0.3)
        if key.endswith("loss") and all(value > 0 for run in runs for value in run.curve(key, axis)[1]):
            panel.set_yscale("log")
            panel.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")  # 0.1, not 10 to the -1
            panel.yaxis.set_minor_formatter("{x:g}")
    found: dict[str, Any] = {}
    for panel in figure.axes:
        handles, labels = panel.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    if found:
        labels = [*found][:_IN_LEGEND]
        figure.legend([found[label] for label in labels], labels, loc="outside lower center",
                      ncols=min(3, len(labels)), fontsize="small")  # fmt: skip
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _draw(panel: Any, group: Sequence[Trained], key: str, axis: Axis, colour: str) -> None:
    """The runs of one experiment."""
    curves = [curve for run in group if (curve := run.curve(key, axis))[0]]
    name = group[0].name if len(group) == 1 else f"{group[0].name} ({len(group)} seeds)"
    line = {"linewidth": 2.0} if len(curves) == 1 else {"linewidth": 0.8, "alpha": 0.5}
    for number, (x, y) in enumerate(curves):
        marker = "." if len(x) == 1 else ""
        label = name if number == 0 else None
        panel.plot(x, y, color=colour, marker=marker, label=label, **line)
    # Where all have values. By the clock two runs are at the same place by chance alone.
    common = sorted(set.intersection(*(set(x) for x, _ in curves))) if len(curves) > 1 and axis != "seconds" else []
    if len(common) > 1:
        values = [dict(zip(x, y, strict=True)) for x, y in curves]
        panel.plot(common, [sum(each[x] for each in values) / len(values) for x in common], color=colour, linewidth=2)
