"""The data folder: changed by one process at a time, its files appear whole, its errors are one line."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

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


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes its name only when complete and on disk; a failure leaves nothing behind."""
    # Not tempfile: its files are private to the user, and a data folder is often shared by a group.
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Deletes what a killed process left half-written in `folder`. Only under the lock: nobody is writing then."""
    for stale in folder.glob(".*.part"):
        with suppress(OSError):
            stale.unlink()


def sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
