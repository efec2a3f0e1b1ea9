"""This process was told to stop: by a signal, or because its launcher died."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Literal

StopState = Literal["INTERRUPT", "PREEMPTED"]

# Slurm and torchrun both deliver a signal; the second copy within this time is no second wish.
ECHO_S = 10.0


class StopRequest:
    """The wish of this process alone; what follows from it is agreed by all ranks.

    While inside, TERM, INT, HUP and the preemption signal ask for a stop instead of ending the process. A second signal
    within ECHO_S is the echo of the first; a third one, or Ctrl-C twice at a terminal, ends the process at once.

    `judge_term` says what a TERM means, which Slurm sends for a preemption and for `scancel` alike.
    """

    def __init__(
        self, preempt_signal: signal.Signals = signal.SIGUSR1, judge_term: Callable[[], StopState] = lambda: "INTERRUPT"
    ) -> None:
        self.preempt_signal = preempt_signal
        self._judge_term = judge_term
        self._told: StopState | None = None
        self._termed = False
        self._first_at: float | None = None
        self._count = 0

    @property
    def told(self) -> StopState | None:
        """Not in a signal handler: the first time after a TERM it asks Slurm, for seconds where that is slow."""
        if self._told is None and self._termed:
            self._told = self._judge_term()
        return self._told

    def tell(self, state: StopState) -> None:
        """Safe in a signal handler and from any thread."""
        self._told = self._told or state

    def __enter__(self) -> StopRequest:
        # HUP: the terminal was closed; nohup ignores it.
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, self.preempt_signal)
        heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
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
            if number == signal.SIGTERM:
                self._termed = True
            else:
                self.tell("PREEMPTED" if number == self.preempt_signal else "INTERRUPT")
            return
        at_terminal = number == signal.SIGINT and sys.stdin is not None and sys.stdin.isatty()
        if self._count > 2 or at_terminal or now - self._first_at > ECHO_S:
            os._exit(128 + number)
