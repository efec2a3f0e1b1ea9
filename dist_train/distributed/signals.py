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
StopReason = Literal["TERM", "INTERRUPT", "PREEMPTED"]  # TERM may mean either: Slurm sends it for both

# What torchrun passes on to its ranks; of any other it would die and leave them behind.
HANDLED_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
# Ranks get this long to save after a signal before torchrun kills them.
SHUTDOWN_TIMEOUT_S = 60
# Slurm and torchrun both deliver a signal, and torchrun again when it gets its own copy twice: a preemption without
# time of grace is up to four TERMs within 20 ms. Copies within this time are no second wish.
ECHO_S = 10.0


class StopRequest:
    """The wish of this process alone; what follows from it is agreed by all ranks.

    While inside, TERM, INT, HUP and the preemption signal ask for a stop instead of ending the process. Signals within
    ECHO_S are echoes of the first; one after that, or Ctrl-C twice at a terminal, ends the process at once.
    """

    def __init__(
        self, preempt_signal: signal.Signals = signal.SIGUSR1, on_repeat: Callable[[int], object] | None = None
    ) -> None:
        """`on_repeat` is called with the number of a repeated signal instead of ending the process."""
        self.preempt_signal = preempt_signal
        self._on_repeat = on_repeat or _end
        self.requested: StopReason | None = None
        self._first_at: float | None = None

    def request(self, wish: StopReason) -> None:
        """Safe in a signal handler and from any thread."""
        self.requested = self.requested or wish

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
        if self._first_at is None:
            self._first_at = now
            wishes: dict[int, StopReason] = {signal.SIGTERM: "TERM", self.preempt_signal: "PREEMPTED"}
            self.request(wishes.get(number, "INTERRUPT"))
            return
        at_terminal = number == signal.SIGINT and sys.stdin is not None and sys.stdin.isatty()
        if at_terminal or now - self._first_at > ECHO_S:
            self._on_repeat(number)


def _end(number: int) -> None:
    os._exit(128 + number)
