"""A rank that hangs says where, and ends itself, long before the scheduler's time limit would."""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# The others go first: they wait for the one that hangs, and what it says must be of it alone.
_AFTER_THE_OTHERS_S = 5.0


_is_off = False


@contextmanager
def off() -> Iterator[None]:
    """Inside, nothing is armed: the process is not ours to end, and its timer may be in use."""
    global _is_off
    _is_off = True
    try:
        yield
    finally:
        _is_off = False


def arm(seconds: float) -> None:
    """Unless this is called again, or `disarm`, within `seconds`, and some more in which the others go.

    Then every thread's stack goes to where the errors of this rank go, and the process ends with exit code 1. A thread
    of C does it: it needs neither the interpreter nor its lock.
    """
    if not _is_off:
        faulthandler.dump_traceback_later(seconds + _AFTER_THE_OTHERS_S, exit=True, file=sys.stderr)


def disarm() -> None:
    """What follows may take its time."""
    if not _is_off:
        faulthandler.cancel_dump_traceback_later()
