"""The timeout of waits in tests.

It only ends a test that hangs: a busy machine takes 38 s to start ranks that it starts in 4 s when idle. Benchmarks
measure speed; the tables show the seconds measured here.
"""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_S = 600.0


def wait_until(
    condition: Callable[[], object], what: str, patience_s: float = PATIENCE_S, every_s: float = 0.05
) -> float:
    """Wait until the condition, looked at `every_s`, is true; return the seconds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < patience_s, f"no {what} within {patience_s} s"
        time.sleep(every_s)
    return time.monotonic() - began
