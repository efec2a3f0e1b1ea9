"""Files and folders that others may look for while they are written: all of them is there, or nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

_ASIDE = ".writing_"


@contextmanager
def atomic_write(
    target: Path, *, durable: bool = True, before_rename: Callable[[], object] = lambda: None
) -> Iterator[Path]:
    """A path beside `target`: the file or folder that is made there gets its name at the end.

    Whoever looks finds what was there before or all of the new one; `durable`: also whoever looks after a power cut.
    What is raised meanwhile, by `before_rename` too, leaves what was there before and no rest. Of folders only an empty
    one is replaced.
    """
    aside = temporary_path(target)
    try:
        yield aside
        if durable:
            for path in (*aside.rglob("*"), aside):
                fsync(path)
        before_rename()
        aside.replace(target)
    except BaseException:
        remove(aside)
        raise
    if durable:
        fsync(target.parent)  # or the rename may be lost


def temporary_path(target: Path) -> Path:
    """Where to write what is to become `target`; `remove_leftovers` knows it. No two are the same, on no machine."""
    return target.with_name(f"{_ASIDE}{target.name}_{uuid4().hex}")


def remove_leftovers(folder: Path, prefix: str = _ASIDE) -> None:
    """What was killed while it wrote into `folder` has left half of it. Only where nobody writes."""
    for stale in folder.glob(f"{prefix}*"):
        remove(stale)


def fsync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """A file, or a folder with all in it; as much as can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def to_json(value: Any) -> str:
    """Strict JSON on one line: no NaN, no Infinity."""
    return json.dumps(value, allow_nan=False)


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    text = json.dumps(value, allow_nan=False, indent=1)
    write_atomically(path, text + "\n", durable=durable)


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, or {} where there is none, or none that can be read."""
    try:
        return parse_object(path.read_bytes())
    except (OSError, ValueError):
        return {}


def parse_object(text: bytes) -> dict[str, Any]:
    """
    Raises:
        ValueError: it is no JSON object.
    """
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"no object but a {type(found).__name__}")
    return found


def write_atomically(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """As `atomic_write`."""
    with atomic_write(path, durable=durable) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
