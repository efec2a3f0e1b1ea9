"""The metrics of a split besides loss and accuracy: those of the setting `metrics`, and the net's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_train.runs.accuracy_text import IS_OWN

_OTHERS = ("loss", "accuracy", "seen", IS_OWN)


def further_metrics(metrics: Mapping[str, Any], split: str) -> dict[str, float]:
    """Return the values by name, without the split. `metrics`: an evaluation or a result, keys val/..., test/..."""
    found = {key.removeprefix(f"{split}/"): value for key, value in metrics.items() if key.startswith(f"{split}/")}
    return {name: value for name, value in found.items() if name not in _OTHERS and isinstance(value, (int, float))}


def further_text(metrics: Mapping[str, Any], split: str) -> list[str]:
    """Return them as ["f1 0.9871", "auroc 0.9998"]."""
    return [f"{name} {value:.4g}" for name, value in further_metrics(metrics, split).items()]
