"""The lock of a start that was made for a run from outside a shell: held from the command until its launcher ends."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from dist_train.atomic_files import open_regular
from dist_train.errors import RunDirError
from dist_train.runs.directory import RunDir

_NAME = ".start.lock"  # its modification time is that of the newest start
_ENDING_S = 5.0  # a launcher may take this long to end after its training has


@contextmanager
def hold_start_lock(run_dir: RunDir) -> Iterator[int]:
    """Hold the lock, and yield its descriptor: a child process that inherits it keeps the lock until it ends.

    Raises:
        RunDirError: a start holds it, or the directory cannot be written.
    """
    try:
        descriptor = os.open(run_dir.path / _NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise RunDirError(f"{run_dir.path} cannot be written: {error.strerror}.") from None
    try:
        if not _acquire(run_dir, descriptor):
            raise RunDirError(f"{run_dir.path.name} is being started already.")
        yield descriptor
    finally:
        os.close(descriptor)


def note_start(descriptor: int) -> None:
    """Record that a start begins now. `descriptor`: of the held lock."""
    os.utime(descriptor)


def is_starting(run_dir: RunDir) -> bool:
    """Whether a start has neither a status nor ended. Writes nothing."""
    return _is_held(run_dir) and not _has_status(run_dir)


def has_failed_to_start(run_dir: RunDir) -> bool:
    """Whether the last start that was noted ended before it had a status."""
    return (run_dir.path / _NAME).exists() and not _has_status(run_dir) and not _is_held(run_dir)


def _acquire(run_dir: RunDir, descriptor: int) -> bool:
    until = time.monotonic() + _ENDING_S
    while time.monotonic() < until:
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if is_starting(run_dir):
            return False
        time.sleep(0.05)
    return False


def _is_held(run_dir: RunDir) -> bool:
    try:
        with open_regular(run_dir.path / _NAME) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # never started
        pass
    return False


def _has_status(run_dir: RunDir) -> bool:
    """Whether the status was written since the last start that was noted."""
    try:
        return run_dir.status.path.stat().st_mtime_ns > (run_dir.path / _NAME).stat().st_mtime_ns
    except OSError:
        return False
