"""A wall clock that is set while a run goes on. On PYTHONPATH of the processes that test_surroundings.py starts.

Of Python's own readers alone: the clock of the machine cannot be set under the other tests.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

DAY_S = 86_400.0
METRICS = Path("runs/r/metrics.jsonl")
_real = time.time


def _jumping() -> float:
    """A year ahead once there are some lines of metrics, and later on a day behind."""
    written = 0
    with suppress(OSError):
        written = METRICS.stat().st_size
    return _real() + (0.0 if written < 3_000 else 365 * DAY_S if written < 6_000 else -DAY_S)


time.time = _jumping
