"""How long a test waits for what must come.

It ends a test that hangs, and measures nothing: a busy machine takes 38 s to start ranks that it starts in 4 s when it
is idle. What has to be quick is measured in benchmarks; the seconds that things took here are in the tables.
"""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_S = 600.0


def wait_until(condition: Callable[[], object], what: str, patience_s: float = PATIENCE_S) -> float:
    """Seconds until it came true."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < patience_s, f"no {what} within {patience_s} s"
        time.sleep(0.05)
    return time.monotonic() - began
