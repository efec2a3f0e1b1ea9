"""Locks that the kernel keeps: each is free as soon as the last process that has it open ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from dist_train.config.paths import own_temporary_folder

# What flock says on a network file system without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def acquire(path: Path, *, wait: bool = False) -> int | None:
    """Lock a file, which is created if need be, and return its descriptor; None if another process holds the lock.

    A child process that inherits the descriptor keeps the lock until it ends. Where the file system has no locks, a
    file in a temporary folder of this machine stands for this one: processes of other machines are then not seen.

    Raises:
        OSError: the file cannot be written.
    """
    return _lock(path, os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_held(path: Path) -> bool:
    """Whether a process holds the lock. Writes nothing."""
    try:
        descriptor = _lock(path, os.O_RDONLY, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # there is no such file
        return False
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is None


def _lock(path: Path, flags: int, operation: int) -> int | None:
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)  # or a pipe of this name would block
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        found = os.fstat(descriptor)
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        folder = own_temporary_folder()
        if error.errno not in _NO_LOCKS or path.parent == folder:
            raise
        return _lock(folder / f"lock-{found.st_dev}-{found.st_ino}", os.O_RDWR | os.O_CREAT, operation)
    return descriptor
