"""Starting processes: a LaunchSpec becomes a torchrun command (pure); `start_ranks` alone runs anything."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from dist_train.checkpoints.resume_hint import is_self_explanatory, resume_hint
from dist_train.distributed.process import (
    ASKED_AT,
    LAUNCHER_PID,
    RUN_DIR,
    threads_per_process,
    without_torchrun_options,
)
from dist_train.distributed.signals import HANDLED_SIGNALS, SHUTDOWN_TIMEOUT_S
from dist_train.errors import LaunchError
from dist_train.launch.diagnosis import diagnose_failure, log_sizes
from dist_train.launch.machines import Nodes
from dist_train.runs.directory import CLEAN_ENDS, RunDir


@dataclass(frozen=True, kw_only=True)
class LaunchSpec:
    """What to start: `nproc` ranks on this machine. Rendering it has no side effects."""

    arguments: tuple[str, ...]  # of `python -m dist_train`
    run_dir: RunDir
    asked_at: float  # time.perf_counter() when the command was given
    nproc: int
    nodes: Nodes | None = None  # None: this machine alone
    max_restarts: int = 0

    def torchrun(self) -> list[str]:
        """The torchrun command line.

        `--standalone` lets torchrun choose a free port.
        """
        return [
            sys.executable, "-m", "torch.distributed.run",
            *(self.nodes.options(self.run_dir) if self.nodes else ["--standalone"]), f"--nproc-per-node={self.nproc}",
            *([f"--max-restarts={self.max_restarts}"] if self.max_restarts else []),
            f"--signals-to-handle={HANDLED_SIGNALS}", f"--shutdown-timeout={SHUTDOWN_TIMEOUT_S}",
            "-m", "dist_train", *self.arguments,
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        """What the ranks get besides our own environment. An explicit OMP_NUM_THREADS wins."""
        return {
            "OMP_NUM_THREADS": str(threads_per_process(self.nproc, os.environ)),
            RUN_DIR: str(self.run_dir.path),
            ASKED_AT: repr(self.asked_at),
            LAUNCHER_PID: str(os.getpid()),
        }

    def __str__(self) -> str:
        return shlex.join(self.torchrun())


def start_ranks(spec: LaunchSpec) -> int:
    """Run the ranks to their end and return the exit code to leave with.

    The screen belongs to rank zero; what torchrun and the libraries say on stderr goes to logs/launcher.log, and of
    a failure the error of the rank that failed first is shown.
    """
    attempt_before = spec.run_dir.read_status().get("attempt", 0)
    logs_before = log_sizes(spec.run_dir)
    if spec.nodes is None:  # else another machine may not have read it yet
        spec.run_dir.error.unlink(missing_ok=True)
    with spec.run_dir.launcher_log.open("ab") as log:
        agent = subprocess.Popen(
            spec.torchrun(),
            env=without_torchrun_options(os.environ) | spec.environment(),
            stderr=log,
            # A terminal's Ctrl-C must reach the ranks once, through us.
            start_new_session=True,
        )
    with _Forwarding(agent) as forwarding:
        agent.wait()

    status = spec.run_dir.read_status()
    if status.get("attempt", 0) > attempt_before and status.get("state") in CLEAN_ENDS:
        return 0  # torchrun itself ends with 1 after a signal, also when all ranks ended well
    if agent.returncode == 0:
        return 0
    if forwarding.requested and not spec.run_dir.error.exists():
        print(f"stopped by {forwarding.requested.name} before the training had begun", file=sys.stderr)
        return 128 + forwarding.requested
    raise _failure(spec, logs_before)


def _failure(spec: LaunchSpec, logs_before: Mapping[Path, int]) -> LaunchError:
    first = spec.run_dir.read_error()
    alone = spec.nproc == 1 and spec.nodes is None
    error = LaunchError(
        first["message"] if alone and "message" in first else diagnose_failure(spec.run_dir, logs_before)
    )
    error.exit_code = first.get("exit_code", 1)
    if not is_self_explanatory(first.get("kind", "")):
        error.add_note(resume_hint(spec.run_dir, spec.nproc if spec.nodes is None else None))
    return error


class _Forwarding:
    """While the ranks run, our signals are theirs. Ctrl-C twice ends them at once."""

    # A terminal that closes (HUP) is a wish to stop; under nohup HUP is ignored and stays so.
    SIGNALS = {
        signal.SIGTERM: signal.SIGTERM,
        signal.SIGINT: signal.SIGINT,
        signal.SIGHUP: signal.SIGTERM,
        signal.SIGUSR1: signal.SIGUSR1,
        signal.SIGUSR2: signal.SIGUSR2,
    }

    def __init__(self, agent: subprocess.Popen[bytes]) -> None:
        self.agent = agent
        self.interrupts = 0
        self.requested: signal.Signals | None = None

    def __enter__(self) -> _Forwarding:
        # Python lets the main thread alone handle signals; from another one the ranks are only waited for.
        in_main = threading.current_thread() is threading.main_thread()
        heard = [number for number in self.SIGNALS if in_main and signal.getsignal(number) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self._forward) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        self.requested = signal.Signals(number)
        self.interrupts += number == signal.SIGINT
        # The ranks notice that torchrun is gone and leave too (watch_launcher).
        self.agent.send_signal(signal.SIGKILL if self.interrupts > 1 else self.SIGNALS[self.requested])
