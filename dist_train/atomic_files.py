"""Atomic writes of files and folders, and strict JSON."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

_TEMPORARY_PREFIX = ".writing_"


@contextmanager
def atomic_write(
    target: Path, *, durable: bool = True, before_rename: Callable[[], object] = lambda: None
) -> Iterator[Path]:
    """Yield a temporary path beside `target`; the file or folder created there is renamed to `target` at the end.

    Readers see either the old content or the complete new content; with `durable`, also after a power failure. On an
    exception, also one of `before_rename`, the old content stays and the temporary path is removed. A folder that is
    not empty is never replaced.
    """
    temporary = temporary_path(target)
    try:
        yield temporary
        if durable:
            for path in (*temporary.rglob("*"), temporary):
                fsync(path)
        before_rename()
        temporary.replace(target)
    except BaseException:
        remove(temporary)
        raise
    if durable:
        fsync(target.parent)  # or the rename may be lost


def temporary_path(target: Path) -> Path:
    """Return a path beside `target`, unique across processes and machines, that `remove_leftovers` recognises."""
    return target.with_name(f"{_TEMPORARY_PREFIX}{target.name}_{uuid4().hex}")


def remove_leftovers(folder: Path, prefix: str = _TEMPORARY_PREFIX) -> None:
    """Remove temporary paths that killed writers left in `folder`. Call it only while no process writes there."""
    for stale in folder.glob(f"{prefix}*"):
        remove(stale)


def fsync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, or a folder with its contents. Best effort: errors are ignored."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def to_json(value: Any) -> str:
    """Return strict JSON on one line: no NaN, no Infinity."""
    return json.dumps(value, allow_nan=False)


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Write strict JSON, as `write_atomically`."""
    text = json.dumps(value, allow_nan=False, indent=1)
    write_atomically(path, text + "\n", durable=durable)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to read it.

    Raises:
        OSError: as `open`; also for a pipe or a device, whose reader could wait for ever.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path) -> bytes:
    """Return the content of a regular file. Raises as `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`, or {} if the file is missing or invalid."""
    try:
        return parse_object(read_regular(path))
    except (OSError, ValueError):
        return {}


def parse_object(text: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ValueError: `text` is not a JSON object.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"not an object but a {type(value).__name__}")
    return value


def write_atomically(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write a file, as `atomic_write`."""
    with atomic_write(path, durable=durable) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
