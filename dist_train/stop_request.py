"""This process was told to stop: by a signal, or because its launcher died."""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType
from typing import Literal

StopState = Literal["INTERRUPT", "PREEMPTED"]

_SIGNALS: dict[int, StopState] = {
    signal.SIGTERM: "INTERRUPT",
    signal.SIGINT: "INTERRUPT",
    signal.SIGHUP: "INTERRUPT",  # the terminal was closed
    signal.SIGUSR1: "PREEMPTED",
}
# Slurm and torchrun both deliver a signal; the second copy within this time is no second wish.
ECHO_S = 10.0


class StopRequest:
    """The wish of this process alone; what follows from it is agreed by all ranks.

    While inside, TERM, INT, HUP and USR1 set `told` instead of ending the process. A second signal within ECHO_S is the
    echo of the first; a third one, or Ctrl-C twice at a terminal, ends the process at once.
    """

    def __init__(self) -> None:
        self.told: StopState | None = None
        self._first_at: float | None = None
        self._count = 0

    def tell(self, state: StopState) -> None:
        """Safe in a signal handler and from any thread."""
        self.told = self.told or state

    def __enter__(self) -> StopRequest:
        heard = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores HUP
        self._before = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        self._count += 1
        if self._first_at is None:
            self._first_at = now
            self.tell(_SIGNALS[number])
            return
        at_terminal = number == signal.SIGINT and sys.stdin is not None and sys.stdin.isatty()
        if self._count > 2 or at_terminal or now - self._first_at > ECHO_S:
            os._exit(128 + number)
