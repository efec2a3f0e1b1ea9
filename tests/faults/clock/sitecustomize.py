"""A wall clock that jumps during a run. On PYTHONPATH of the processes that test_surroundings.py starts.

Only Python's time.time jumps: changing the machine's clock would disturb the other tests.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

DAY_S = 86_400.0
METRICS = Path("runs/r/metrics.jsonl")
_real = time.time


def _jumping() -> float:
    """Return a time one year ahead once there are some lines of metrics, and later one day behind."""
    written = 0
    with suppress(OSError):
        written = METRICS.stat().st_size
    return _real() + (0.0 if written < 3_000 else 365 * DAY_S if written < 6_000 else -DAY_S)


time.time = _jumping
