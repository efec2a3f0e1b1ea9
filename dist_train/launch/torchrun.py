"""Start ranks with torchrun: a LaunchSpec renders the command (no side effects), `start_ranks` runs it."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from dist_train.checkpoints.resume_hint import is_self_explanatory, resume_hint
from dist_train.distributed.process_info import (
    ASKED_AT,
    LAUNCHER_PID,
    RUN_DIR,
    threads_per_process,
    without_torchrun_options,
)
from dist_train.distributed.signals import HANDLED_SIGNALS, SHUTDOWN_TIMEOUT_S, install_handler
from dist_train.errors import LaunchError
from dist_train.launch.diagnosis import diagnose_failure, log_sizes
from dist_train.launch.machines import Nodes
from dist_train.runs.directory import RunDir
from dist_train.runs.status_file import CLEAN_ENDS


@dataclass(frozen=True, kw_only=True)
class LaunchSpec:
    """What to start: `nproc` ranks on this machine. Rendering it has no side effects."""

    arguments: tuple[str, ...]  # for `python -m dist_train`
    run_dir: RunDir
    asked_at: float  # time.perf_counter() when the command was given
    nproc: int
    nodes: Nodes | None = None  # None: this machine alone
    max_restarts: int = 0

    def torchrun(self) -> list[str]:
        """Return the torchrun command line.

        `--standalone` lets torchrun choose a free port.
        """
        return [
            sys.executable, "-m", "torch.distributed.run",
            *(self.nodes.options(self.run_dir) if self.nodes else ["--standalone"]), f"--nproc-per-node={self.nproc}",
            *([f"--max-restarts={self.max_restarts}"] if self.max_restarts else []),
            f"--signals-to-handle={HANDLED_SIGNALS}",
            "-m", "dist_train", *self.arguments,
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        """Return what is added to our environment for the ranks. An explicit OMP_NUM_THREADS takes precedence."""
        return {
            "OMP_NUM_THREADS": str(threads_per_process(self.nproc, os.environ)),
            RUN_DIR: str(self.run_dir.path),
            ASKED_AT: repr(self.asked_at),
            LAUNCHER_PID: str(os.getpid()),
            # Not the option of the same name, which torch 2.11 does not have.
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_TIMEOUT_S)),
        }

    def __str__(self) -> str:
        return shlex.join(self.torchrun())


def start_ranks(spec: LaunchSpec) -> int:
    """Run the ranks to completion and return our exit code.

    Only rank zero writes to the terminal; stderr of torchrun and the libraries goes to logs/launcher.log. After a
    failure, the error of the rank that failed first is shown.
    """
    attempt_before = spec.run_dir.status.read().get("attempt", 0)
    logs_before = log_sizes(spec.run_dir)
    if spec.nodes is None:  # otherwise another machine may not have read it yet
        spec.run_dir.error.unlink(missing_ok=True)
    with spec.run_dir.launcher_log.open("ab") as log:
        agent = subprocess.Popen(
            spec.torchrun(),
            env=without_torchrun_options(os.environ) | spec.environment(),
            stderr=log,
            # A terminal's Ctrl-C must reach the ranks only once, from us.
            start_new_session=True,
        )
    with _Forwarding(agent) as forwarding:
        agent.wait()

    status = spec.run_dir.status.read()
    if status.get("attempt", 0) > attempt_before and status.get("state") in CLEAN_ENDS:
        return 0  # torchrun exits with 1 after a signal, even if all ranks ended cleanly
    if agent.returncode == 0:
        return 0
    if forwarding.requested and not spec.run_dir.error.exists():
        print(f"stopped by {forwarding.requested.name} before training began", file=sys.stderr)
        return 128 + forwarding.requested
    raise _failure(spec, logs_before)


def _failure(spec: LaunchSpec, logs_before: Mapping[Path, int]) -> LaunchError:
    first = spec.run_dir.read_error()
    alone = spec.nproc == 1 and spec.nodes is None
    error = LaunchError(
        first["message"] if alone and "message" in first else diagnose_failure(spec.run_dir, logs_before)
    )
    error.exit_code = first.get("exit_code", 1)
    hint = resume_hint(spec.run_dir, spec.nproc if spec.nodes is None else None)
    if hint and not is_self_explanatory(first.get("kind", "")):
        error.add_note(hint)
    return error


class _Forwarding:
    """Forwards our signals to the ranks while they run. A second Ctrl-C ends them at once."""

    # A closed terminal (HUP) is a stop request; under nohup, HUP stays ignored.
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
        self.previous = install_handler(self._forward, self.SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        self.requested = signal.Signals(number)
        self.interrupts += number == signal.SIGINT
        # The ranks notice that torchrun is gone and exit too (watch_launcher).
        self.agent.send_signal(signal.SIGKILL if self.interrupts > 1 else self.SIGNALS[self.requested])
