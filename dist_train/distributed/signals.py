"""Stop requests to this process: signals, or the death of its launcher."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, Literal

StopState = Literal["INTERRUPT", "PREEMPTED"]
StopReason = Literal["TERM", "INTERRUPT", "PREEMPTED"]  # launch/slurm/preemption.py asks Slurm what a TERM means

# The signals torchrun forwards to its ranks; any other one ends torchrun and leaves the ranks behind.
HANDLED_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
# Seconds that ranks have to save after a signal, before torchrun kills them.
SHUTDOWN_TIMEOUT_S = 60
# Slurm and torchrun both deliver a signal, and torchrun twice if it receives two copies: a preemption without grace
# time sends up to four TERMs within 20 ms. Signals within this time of the first are copies, not a second request.
ECHO_S = 10.0


def install_handler(
    handler: Callable[[int, FrameType | None], object], numbers: Iterable[signal.Signals]
) -> dict[signal.Signals, Any]:
    """Handle those signals that are not ignored, and return their previous handlers. Only the main thread can: from
    another one nothing is installed."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    handled = [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    return {number: signal.signal(number, handler) for number in handled}


class StopRequest:
    """The stop request of this process only; all ranks then agree on whether and when to stop.

    Inside its `with` block, TERM, INT, HUP and the preemption signal request a stop instead of ending the process.
    Signals within ECHO_S of the first are ignored; a later one, or a second Ctrl-C at a terminal, ends the process.
    """

    def __init__(
        self, preempt_signal: signal.Signals = signal.SIGUSR1, on_repeat: Callable[[int], object] | None = None
    ) -> None:
        """`on_repeat` is called with the number of a repeated signal instead of ending the process."""
        self.preempt_signal = preempt_signal
        self._on_repeat = on_repeat or _end
        self.requested: StopReason | None = None
        self._first_at: float | None = None

    def request(self, reason: StopReason) -> None:
        """Request a stop; the first reason is kept. Safe in a signal handler and from any thread."""
        self.requested = self.requested or reason

    def __enter__(self) -> StopRequest:
        # HUP: the terminal was closed. It stays ignored under nohup.
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, self.preempt_signal)
        self._before = install_handler(self._handle, numbers)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first_at is None:
            self._first_at = now
            reasons: dict[int, StopReason] = {signal.SIGTERM: "TERM", self.preempt_signal: "PREEMPTED"}
            self.request(reasons.get(number, "INTERRUPT"))
            return
        in_script = self._on_repeat is not _end  # nothing there sends copies of a signal
        at_terminal = in_script or (sys.stdin is not None and sys.stdin.isatty())
        if (number == signal.SIGINT and at_terminal) or now - self._first_at > ECHO_S:
            self._on_repeat(number)


def _end(number: int) -> None:
    os._exit(128 + number)
