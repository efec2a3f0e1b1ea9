"""Numbers as the page shows them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from dist_train.runs.accuracy_text import accuracy_text


def duration(seconds: float | None) -> str:
    """ "5 s", "3 min", "2 h", "4 d"; - if unknown."""
    if seconds is None:
        return "-"
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def accuracy(metrics: Mapping[str, Any], split: str) -> str:
    return accuracy_text(metrics, split, " %") or "-"


def number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def size(num_bytes: float | None) -> str:
    """ "21.4 MB"; - if unknown."""
    if num_bytes is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def moment(seconds: float) -> str:
    """ "2026-11-27 14:03", local time."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
