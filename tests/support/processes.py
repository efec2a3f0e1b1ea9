"""Real processes, started as by a user and killed when the test ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
DIST_TRAIN = [str(BIN / "dist-train")]


@contextlib.contextmanager
def started(
    command: list[str], folder: Path, terminal: int | None = None, **env: str
) -> Iterator[subprocess.Popen[str]]:
    """Start a process in its own session; kill what is left of it on exit."""
    out = subprocess.PIPE if terminal is None else terminal
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"} | env
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=terminal, stdout=out, stderr=out, text=True,
        start_new_session=terminal is None,
    )  # fmt: skip
    try:
        yield process
    finally:
        for pid in alive(folder):
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def run(command: list[str], folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    with started(command, folder, None, **env) as process:
        out, err = process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, out, err)


def alive(folder: Path) -> list[int]:
    """Return the processes whose working directory is `folder`, except zombies: those of one test in any session."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and (process / "cwd").resolve() == folder.resolve():
                found.append(int(process.name))
    return found


def command_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""


def ranks_of(folder: Path) -> list[int]:
    """Return the training processes in `folder`, without launchers."""
    launchers = ("torch.distributed.run", "torchrun", "launch")
    commands = {pid: command_of(pid) for pid in alive(folder)}
    return [
        pid
        for pid, command in commands.items()
        if " dist_train train" in command and not any(name in command for name in launchers)
    ]
