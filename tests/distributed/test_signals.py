"""Signals: the first requests a stop, those soon after it are ignored as echoes, a later one ends the process."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest

from dist_train.distributed import signals as module
from dist_train.distributed.signals import ECHO_S, StopRequest
from support.clock import Clock

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

CHILD = """
import os, signal, sys, time
from dist_train.distributed import signals as stop_request
stop_request.ECHO_S = float(sys.argv[1])
def reporting(handle):
    def handle_and_report(number, frame):
        handle(number, frame)
        os.write(1, f"{number} {request.requested}\\n".encode())  # print is not reentrant
    return handle_and_report
with stop_request.StopRequest() as request:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, reporting(signal.getsignal(number)))
    print("ready", flush=True)
    while True:
        time.sleep(1)
"""


@contextmanager
def child(echo_s: float = ECHO_S, stdin: int = subprocess.DEVNULL) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-c", CHILD, str(echo_s)]
    with subprocess.Popen(argv, stdin=stdin, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert line_of(process) == "ready"
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


@pytest.mark.parametrize(
    ("number", "state"),
    [(signal.SIGTERM, "TERM"), (signal.SIGINT, "INTERRUPT"), (signal.SIGUSR1, "PREEMPTED")],
)
def test_first_signal_sets_reason_and_its_echo_is_ignored(number: int, state: str) -> None:
    before = {number: signal.getsignal(number) for number in HANDLED}
    with StopRequest() as request:
        assert request.requested is None
        for sent in (number, signal.SIGTERM):  # Slurm's signal, then a TERM from torchrun
            os.kill(os.getpid(), sent)
            assert request.requested == state
    assert {number: signal.getsignal(number) for number in HANDLED} == before


def test_burst_of_signals_is_one_request() -> None:
    """Slurm and torchrun together send such a burst at a preemption. Each signal waits until the last was handled."""
    with child() as process:
        for _ in range(4):
            process.send_signal(signal.SIGTERM)
            assert line_of(process) == f"{int(signal.SIGTERM)} TERM"
        assert process.poll() is None


def test_second_signal_after_echo_ends_process() -> None:
    with child(echo_s=0.0) as process:
        process.send_signal(signal.SIGUSR1)
        assert line_of(process) == f"{int(signal.SIGUSR1)} PREEMPTED"
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143


def test_echo_lasts_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    class Exited(Exception):
        pass

    def exit_(code: int) -> None:
        raise Exited(code)

    monkeypatch.setattr(os, "_exit", exit_)
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    for after, ends in ((9.9, False), (10.1, True)):
        with StopRequest() as request:
            signal.raise_signal(signal.SIGTERM)
            clock.now += after
            with pytest.raises(Exited, match="143") if ends else nullcontext():
                signal.raise_signal(signal.SIGTERM)
        assert request.requested == "TERM"


def test_ctrl_c_twice_at_terminal_ends_process() -> None:
    ours, theirs = pty.openpty()
    try:
        with child(stdin=theirs) as process:
            process.send_signal(signal.SIGINT)
            assert line_of(process) == f"{int(signal.SIGINT)} INTERRUPT"
            process.send_signal(signal.SIGINT)
            assert process.wait() == 130
    finally:
        os.close(ours)
        os.close(theirs)


def test_second_interrupt_without_terminal_is_echo() -> None:
    with child() as process:
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            assert line_of(process) == f"{int(signal.SIGINT)} INTERRUPT"
        assert process.poll() is None


def test_first_reason_is_kept() -> None:
    request = StopRequest()
    request.request("PREEMPTED")
    request.request("INTERRUPT")
    assert request.requested == "PREEMPTED"
