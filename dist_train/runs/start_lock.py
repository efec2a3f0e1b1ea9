"""The lock of a start that was made for a run from outside a shell: held from the command until its launcher ends."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from dist_train.errors import RunDirError
from dist_train.runs import kernel_lock
from dist_train.runs.directory import RunDir

NAME = ".start.lock"  # empty until a start is noted; its modification time is that of the newest one
_ENDING_S = 5.0  # a launcher may take this long to end after its training has


@contextmanager
def hold_start_lock(run_dir: RunDir) -> Iterator[int]:
    """Hold the lock, and yield its descriptor: a child process that inherits it keeps the lock until it ends.

    Raises:
        RunDirError: a start holds it, or the directory cannot be written.
    """
    try:
        descriptor = _acquire(run_dir)
    except OSError as error:
        raise RunDirError(f"{run_dir.path} cannot be written: {error.strerror}.") from None
    if descriptor is None:
        raise RunDirError(f"{run_dir.path.name} is being started already.")
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def note_start(run_dir: RunDir) -> None:
    """Record that a start begins now. Needs the lock."""
    (run_dir.path / NAME).write_text("started\n")


def is_starting(run_dir: RunDir) -> bool:
    """Whether a start has neither a status nor ended. Writes nothing."""
    return _lacks_status(run_dir) and kernel_lock.is_held(run_dir.path / NAME)


def has_failed_to_start(run_dir: RunDir) -> bool:
    """Whether the last start that was noted ended before it had a status."""
    return _lacks_status(run_dir) and not kernel_lock.is_held(run_dir.path / NAME)


def _acquire(run_dir: RunDir) -> int | None:
    until = time.monotonic() + _ENDING_S
    while (descriptor := kernel_lock.acquire(run_dir.path / NAME)) is None:
        if is_starting(run_dir) or time.monotonic() > until:
            return None
        time.sleep(0.05)
    return descriptor


def _lacks_status(run_dir: RunDir) -> bool:
    """Whether a start was noted, and no status was written since."""
    try:
        noted = (run_dir.path / NAME).stat()
    except OSError:  # never started
        return False
    try:
        return noted.st_size > 0 and run_dir.status.path.stat().st_mtime_ns <= noted.st_mtime_ns
    except OSError:
        return True
