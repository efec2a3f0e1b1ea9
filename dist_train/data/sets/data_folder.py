"""Write access to the data folder: a lock for one process at a time, and one-line errors."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dist_train.errors import DataError

_log = logging.getLogger(__name__)

LOCK_NAME = ".dist_train.lock"
LOCK_TIMEOUT_S = 1800.0  # another rank may be downloading 0.5 GB over a slow connection


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold an exclusive lock on `root`, which is created if it is missing.

    Raises:
        DataError: `root` cannot be written, or another process held the lock for half an hour.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(root / LOCK_NAME)
    try:
        root.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _log.info("Waiting for another process that is writing to %s.", root)
            lock.acquire(timeout=LOCK_TIMEOUT_S)
    except Timeout:
        raise DataError(
            f"Another process has held {root / LOCK_NAME} for {LOCK_TIMEOUT_S:.0f} s. "
            "If it hangs, kill it: that releases the lock."
        ) from None
    except OSError as error:
        raise unwritable(root, error) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def disk_errors(folder: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Translate operating system errors of writes below `folder` into one line with a fix."""
    try:
        yield
    except OSError as error:
        raise unwritable(folder, error, needed_bytes) from None


def unwritable(folder: Path, error: OSError, needed_bytes: int | None = None) -> DataError:
    """Return the error for a failed write below `folder`, with the fix."""
    room = ""
    if needed_bytes is not None:
        with suppress(OSError):  # the folder may not exist
            free = shutil.disk_usage(folder).free
            room = f" ({needed_bytes / 1e6:.1f} MB to write, {free / 1e6:.1f} MB free)"
    return DataError(
        f"Cannot write to {folder}: {error.strerror or error}{room}. "
        "Set data.root or DIST_TRAIN_DATA_DIR to a writable folder with enough space."
    )
