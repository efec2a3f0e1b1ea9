"""Start child processes: the trainings of a sweep, and measurements whose output is read."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias

from dist_train.distributed.process_info import LAUNCHER_PID, OF_ONE_WANDB_RUN, without_torchrun_options
from dist_train.errors import LaunchError

Training: TypeAlias = subprocess.Popen[bytes]


def begin_train(arguments: Sequence[str], log: Path, num_threads: int, group: str) -> Training:
    """Start a training in a child process that does not outlive this one. Its output goes to `log`.

    `group`: the W&B group, unless the environment names one. A W&B run named there is another one.
    """
    environment = {name: value for name, value in os.environ.items() if name not in OF_ONE_WANDB_RUN} | {
        "OMP_NUM_THREADS": str(num_threads),
        LAUNCHER_PID: str(os.getpid()),
        "WANDB_RUN_GROUP": os.environ.get("WANDB_RUN_GROUP") or group,
    }
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "dist_train", "train", *arguments],
            stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=environment,
            start_new_session=True,  # a terminal's Ctrl-C must reach it only once, from us
        )  # fmt: skip


def output_of(module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """Return the stdout of `python -m MODULE ARGUMENT...`, run with `environment` added to our own.

    Raises:
        LaunchError: it failed; with the end of its stderr.
    """
    command = [sys.executable, "-m", module, *arguments]
    environment = {**without_torchrun_options(os.environ), **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        tail = "\n".join(done.stderr.splitlines()[-60:])  # torchrun's summary alone has 15 or more
        raise LaunchError(f"{shlex.join([module, *arguments])} failed with exit code {done.returncode}:\n{tail}")
    return done.stdout


def output_of_ranks(nproc: int, module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """Return the combined stdout of `nproc` ranks of `python -m MODULE ARGUMENT...` under torchrun."""
    options = ["--standalone", f"--nproc-per-node={nproc}", "-m", module]
    return output_of("torch.distributed.run", *options, *arguments, environment=environment)


@contextmanager
def running(
    *arguments: str, log: Path, has_begun: Callable[[], bool], environment: Mapping[str, str] | None = None
) -> Iterator[int]:
    """Run `dist-train ARGUMENT...` while the context lasts, and yield its process id once it `has_begun`.

    Its output goes to `log`; `environment` is added to our own.

    Raises:
        LaunchError: it ended before; with its output.
    """
    environment = {**without_torchrun_options(os.environ), **(environment or {})}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "dist_train", *arguments],
            stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=environment,
        )  # fmt: skip
    try:
        while not has_begun():
            if process.poll() is not None:
                raise LaunchError(
                    f"{shlex.join(arguments)} ended with exit code {process.returncode}:\n{log.read_text()}"
                )
            time.sleep(0.005)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def begin_detached(
    command: Sequence[str], log: Path, folder: Path, environment: Mapping[str, str], *, inherited: int,
    append: bool = False,
) -> None:  # fmt: skip
    """Start a process that outlives this one, and keeps the descriptor `inherited` open.

    Its output replaces what is in `log`, or with `append` follows it.
    """
    with log.open("ab" if append else "wb") as file:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            pass_fds=(inherited,), start_new_session=True,
        )  # fmt: skip
    threading.Thread(target=process.wait, name="detached", daemon=True).start()  # or it would stay as a zombie


def limited_output_of(
    *arguments: str,
    timeout_s: float,
    memory_bytes: int,
    python: str = "",
    folder: Path | None = None,
    environment: Mapping[str, str] = os.environ,
) -> str:
    """Return the stdout of `dist-train ARGUMENT...`, run at low priority for `timeout_s` at most.

    `memory_bytes`: how much each of its processes may allocate; `python`: the interpreter, "" for ours; `folder`: to
    run it in, None for the current one.

    Raises:
        LaunchError: it failed, with its message, or took too long.
    """
    with _limited(arguments, memory_bytes, python, folder, environment) as process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise LaunchError(
                f"dist-train {arguments[0]} took longer than {timeout_s:.0f} s and was stopped."
            ) from None
        _raise_failure(process, err)
    return out


def limited_lines_of(*arguments: str) -> Generator[str]:
    """Yield the lines that `dist-train ARGUMENT...` prints, run at low priority until it ends or this is closed.

    Raises:
        LaunchError: it failed, with its message.
    """
    with _limited(arguments) as process:
        assert process.stdout is not None
        yield from process.stdout
        _raise_failure(process, process.communicate()[1])


@contextmanager
def _limited(
    arguments: Sequence[str],
    memory_bytes: int | None = None,
    python: str = "",
    folder: Path | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Iterator[subprocess.Popen[str]]:
    """Start `dist-train ARGUMENT...` at low priority. At the end it is killed, with its own processes."""
    memory = f"ulimit -d {memory_bytes // 1024} 2> /dev/null; " if memory_bytes else ""
    with subprocess.Popen(
        ["sh", "-c", f'{memory}exec nice -n 10 "$@"', "sh", python or sys.executable, "-m", "dist_train", *arguments],
        text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder,
        env=without_torchrun_options(environment), start_new_session=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):  # its own processes too: they would keep the pipes open
                os.killpg(process.pid, signal.SIGKILL)


def _raise_failure(process: subprocess.Popen[str], err: str) -> None:
    if process.returncode:
        lines = err.strip().splitlines() or [f"exit code {process.returncode}"]
        first = next((number for number, line in enumerate(lines) if line.startswith("error: ")), -1)
        raise LaunchError("\n".join(lines[first:]).removeprefix("error: "))


def output_of_program(*command: str, timeout_s: float) -> str:
    """Return the stdout of a program of the system.

    Raises:
        LaunchError: it is not installed, failed or took too long.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise LaunchError(f"{command[0]}: {error}.") from None
    return done.stdout
