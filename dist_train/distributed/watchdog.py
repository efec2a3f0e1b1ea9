"""A rank that hangs says where, and ends itself, long before the scheduler's time limit would."""

from __future__ import annotations

import faulthandler
import sys

# The others go first: they wait for the one that hangs, and what it says must be of it alone.
_AFTER_THE_OTHERS_S = 5.0


def arm(seconds: float) -> None:
    """Unless this is called again, or `disarm`, within `seconds`, and some more in which the others go.

    Then every thread's stack goes to where the errors of this rank go, and the process ends with exit code 1. A thread
    of C does it: it needs neither the interpreter nor its lock.
    """
    faulthandler.dump_traceback_later(seconds + _AFTER_THE_OTHERS_S, exit=True, file=sys.stderr)


def disarm() -> None:
    """What follows may take its time."""
    faulthandler.cancel_dump_traceback_later()
