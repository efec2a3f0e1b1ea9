"""The accuracy of a split as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Beside an accuracy, with the value 1: it is a metric of the net's own, which may be no share of the examples.
IS_OWN = "accuracy_is_own"


def is_share(metrics: Mapping[str, Any], split: str) -> bool:
    """Whether the accuracy of a split, if there is one, is the share of examples that were counted as correct."""
    return not metrics.get(f"{split}/{IS_OWN}")


def accuracy_text(metrics: Mapping[str, Any], split: str, unit: str = "%") -> str | None:
    """Return the accuracy of a split, in percent if it is a share of the examples. None if there is none."""
    accuracy = metrics.get(f"{split}/accuracy")
    if accuracy is None:
        return None
    return f"{100 * accuracy:.2f}{unit}" if is_share(metrics, split) else f"{accuracy:g}"
