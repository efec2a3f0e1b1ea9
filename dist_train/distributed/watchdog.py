"""A watchdog that prints the stacks of a hanging rank and ends it, long before the scheduler's time limit."""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# The other ranks, which wait for the hanging one, time out first: only the hanging rank must print its stacks.
_AFTER_OTHER_RANKS_S = 5.0
_is_off = False


@contextmanager
def off() -> Iterator[None]:
    """Keep the watchdog off inside: the process belongs to the user's script, whose own timer may be armed."""
    global _is_off
    _is_off = True
    try:
        yield
    finally:
        _is_off = False


def arm(seconds: float) -> None:
    """End this process unless `arm` or `disarm` is called within `seconds` (plus the time the other ranks need to end).

    It then prints the stacks of all threads to stderr and exits with code 1. A C thread does this: it needs neither
    the interpreter nor the GIL.
    """
    if not _is_off:
        faulthandler.dump_traceback_later(seconds + _AFTER_OTHER_RANKS_S, exit=True, file=sys.stderr)


def disarm() -> None:
    """Stop the watchdog: what follows may take any time."""
    if not _is_off:
        faulthandler.cancel_dump_traceback_later()
