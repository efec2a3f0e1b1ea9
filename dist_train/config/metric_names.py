"""The names that `metrics` takes for each task. torchmetrics, which computes the values, is not needed for a check."""

from __future__ import annotations

import re
from typing import Literal

Task = Literal["classification", "multi_label", "regression"]

_OF_CLASSES = ("f1", "precision", "recall", "auroc", "average_precision")  # means over the classes or labels
_OF_TASK: dict[Task, tuple[str, ...]] = {
    "classification": _OF_CLASSES,
    "multi_label": _OF_CLASSES,
    "regression": ("mae", "mse", "rmse", "r2"),
}
_ERRORS = ("mae", "mse", "rmse", "loss")  # the lower, the better
_TOP = re.compile(r"top([2-9]|[1-9][0-9]{1,2})")  # top5: the label is among the five highest logits; over the examples


def check_metrics(task: Task, names: list[str]) -> None:
    """Check that there are such metrics of the task.

    Raises:
        ValueError: one of them does not exist.
    """
    for name in names:
        if name not in _OF_TASK[task] and not (task == "classification" and _TOP.fullmatch(name)):
            if name in ("loss", "accuracy"):
                raise ValueError(f"{name} is always there. Leave it out")
            top = ", top5 or another number" if task == "classification" else ""
            raise ValueError(f"task={task} has no {name}. It has {', '.join(_OF_TASK[task])}{top}")


def direction(name: str) -> Literal["max", "min"] | None:
    """Return which value of a metric is better, None if that is not known: of a net's own metric."""
    if name in _ERRORS:
        return "min"
    return "max" if name in ("accuracy", "accuracy_tta", *_OF_CLASSES, "r2") or _TOP.fullmatch(name) else None


def top_k(name: str) -> int | None:
    """Return the 5 of top5, None for another metric."""
    found = _TOP.fullmatch(name)
    return int(found[1]) if found else None
