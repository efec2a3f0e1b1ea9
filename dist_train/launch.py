"""Starting processes: a LaunchSpec becomes a torchrun command (pure); `start_ranks` alone runs anything."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from dist_train.environment import LAUNCHER_PID, RUN_DIR, available_cores
from dist_train.errors import ConfigError, LaunchError
from dist_train.run_dir import CLEAN_ENDS, RunDir, read_json, write_atomically

# What torchrun passes on to its ranks; of any other it would die and leave them behind.
HANDLED_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
# Ranks get this long to save after a signal before torchrun kills them.
SHUTDOWN_TIMEOUT_S = 60
# Ranks whose launcher has died get this long to save and leave.
ORPHAN_GRACE_S = 3.0


_PORT = 29_400  # torchrun's own
_SILENT_S = 30.0  # a run whose heartbeat, of every 5 s, has not changed for so long is not at work


@dataclass(frozen=True)
class Nodes:
    """Several machines that train together, each with a launcher of its own."""

    at_least: int
    at_most: int
    endpoint: str  # HOST:PORT

    @classmethod
    def parse(cls, text: str, endpoint: str) -> Nodes:
        """`text`: "2" or "1:4".

        Raises:
            ConfigError: neither.
            LaunchError: the host of the endpoint has no address.
        """
        found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
        least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= least <= most:
            raise ConfigError(f"--nnodes={text} is no number of machines. Write 2, or 1:4 for one to four.")
        host, _, port = endpoint.partition(":")
        try:
            socket.getaddrinfo(host, None)
        except OSError:
            raise LaunchError(
                f'--rdzv-endpoint={endpoint}: "{host}" cannot be resolved on {socket.gethostname()}. '
                f"Write the name or address of one of the machines."
            ) from None
        return cls(least, most, f"{host}:{port or _PORT}")

    def options(self, run_dir: RunDir) -> list[str]:
        """Of torchrun. They meet for the next attempt of the run: machines that come late must not join this one."""
        attempt = run_dir.read_status().get("attempt", 0) + 1
        number = f"{self.at_least}" if self.at_least == self.at_most else f"{self.at_least}:{self.at_most}"
        return [
            f"--nnodes={number}", "--rdzv-backend=c10d", f"--rdzv-endpoint={self.endpoint}",
            f"--rdzv-id={run_dir.path.name}.{attempt}",
            "--rdzv-conf=last_call_timeout=10",  # so long a smaller world waits for more machines
        ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LaunchSpec:
    """What to start: `nproc` ranks on this machine. Rendering it has no side effects."""

    arguments: tuple[str, ...]  # of `python -m dist_train`
    run_dir: RunDir
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
        threads = max(1, available_cores() // self.nproc)
        return {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
            RUN_DIR: str(self.run_dir.path),
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
    if spec.nodes is None:  # else another machine may not have read it yet
        spec.run_dir.error.unlink(missing_ok=True)
    with spec.run_dir.launcher_log.open("ab") as log:
        agent = subprocess.Popen(
            spec.torchrun(),
            env=os.environ | spec.environment(),
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
    if forwarding.told and not spec.run_dir.error.exists():
        print(f"stopped by {forwarding.told.name} before the training had begun", file=sys.stderr)
        return 128 + forwarding.told
    raise _failure(spec, agent.returncode)


def make_room(run_dir: RunDir) -> None:
    """Before this machine joins a run that others are training: they save and stop, to start again with one more.

    torchrun itself takes in a machine while its ranks run, but then often waits for itself (torch 2.13).
    """
    seen, seen_at = run_dir.read_status().get("heartbeat"), time.monotonic()
    while time.monotonic() - seen_at < _SILENT_S:  # by its change alone: the clocks of two machines may differ
        status = run_dir.read_status()
        if status.get("state") in (None, "ERROR", *CLEAN_ENDS):
            break
        if status.get("heartbeat") != seen:
            seen, seen_at = status.get("heartbeat"), time.monotonic()
            if not run_dir.stop_wish.exists():
                write_atomically(run_dir.stop_wish, "PREEMPTED\n", durable=False)
        time.sleep(0.5)
    run_dir.stop_wish.unlink(missing_ok=True)


def output_of(module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """What `python -m MODULE ARGUMENT...` prints on stdout, with `environment` besides our own.

    Raises:
        LaunchError: it failed; with the end of what it said.
    """
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | (environment or {}))
    if done.returncode:
        tail = "\n".join(done.stderr.splitlines()[-15:])
        raise LaunchError(f"{shlex.join([module, *arguments])} failed with exit code {done.returncode}:\n{tail}")
    return done.stdout


def _failure(spec: LaunchSpec, code: int) -> LaunchError:
    first = read_json(spec.run_dir.error)
    if first:
        error = LaunchError(f"{first['message']}" + (f"  [rank {first['rank']}]" if spec.nproc > 1 else ""))
        error.exit_code = int(first.get("exit_code", 1))
        return error
    tail = spec.run_dir.launcher_log.read_text(errors="replace").splitlines()[-15:]
    return LaunchError(
        "\n".join(tail) + f"\nThe ranks ended with exit code {code} and left no error of their own (killed?). "
        f"The whole output: {spec.run_dir.launcher_log}."
    )


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
        self.told: signal.Signals | None = None

    def __enter__(self) -> _Forwarding:
        heard = [number for number in self.SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self._forward) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        self.told = signal.Signals(number)
        self.interrupts += number == signal.SIGINT
        # The ranks notice that torchrun is gone and leave too (watch_launcher).
        self.agent.send_signal(signal.SIGKILL if self.interrupts > 1 else self.SIGNALS[self.told])


def watch_launcher(on_death: Callable[[], None]) -> None:
    """Do not outlive the launcher: torchrun puts its workers in sessions of their own, and `kill -9` leaves them.

    When our parent, or the `dist-train launch` above it, has died, `on_death` is called (ask for an agreed stop) and
    after ORPHAN_GRACE_S this process ends, saved or not. A thread, since a parent-death signal would not reach past
    torchrun to our own launcher and does not exist outside Linux.
    """
    parent = os.getppid()
    launcher = int(os.environ.get(LAUNCHER_PID, parent))
    orphaned = parent == 1 and not _launches(parent)  # it died before we could look

    def watch() -> None:
        while not orphaned and os.getppid() == parent and _alive(launcher):
            time.sleep(0.25)
        on_death()
        time.sleep(ORPHAN_GRACE_S)
        os._exit(1)

    threading.Thread(target=watch, name="watch_launcher", daemon=True).start()


def _launches(pid: int) -> bool:
    """Whether this is a launcher: in a container torchrun itself may be process 1."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return True  # not Linux: nothing to tell from
    return any(word in command for word in ("torchrun", "torch.distributed", "accelerate"))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with suppress(OSError):  # a zombie that nobody has waited for is dead too
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    return True
