"""The data folder: changed by one process at a time, its errors are one line."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dist_train.errors import DataError

_log = logging.getLogger(__name__)

LOCK_NAME = ".dist_train.lock"
LOCK_TIMEOUT_S = 1800.0  # another rank may be downloading half a gigabyte over a slow line


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Holds the only right to change `root`, which is made if it is missing.

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
            _log.info("waiting for another process that fills %s", root)
            lock.acquire(timeout=LOCK_TIMEOUT_S)
    except Timeout:
        raise DataError(
            f"Another process has held {root / LOCK_NAME} for {LOCK_TIMEOUT_S:.0f} s. "
            "If it hangs, end it: its lock goes with it."
        ) from None
    except OSError as error:
        raise unwritable(root, error) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def disk_errors(folder: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turns what the operating system says about writing below `folder` into one line with a way out."""
    try:
        yield
    except OSError as error:
        raise unwritable(folder, error, needed_bytes) from None


def unwritable(folder: Path, error: OSError, needed_bytes: int | None = None) -> DataError:
    room = ""
    if needed_bytes is not None:
        with suppress(OSError):  # the folder may not even exist
            free = shutil.disk_usage(folder).free
            room = f" ({needed_bytes / 1e6:.1f} MB to write, {free / 1e6:.1f} MB free)"
    return DataError(
        f"Cannot write to {folder}: {error.strerror or error}{room}. "
        "Set data.root or DIST_TRAIN_DATA_DIR to a folder that can be written and has room."
    )
