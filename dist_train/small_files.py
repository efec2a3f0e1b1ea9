"""Small files that others read while we write them: whole or not at all, and strict JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def to_json(value: Any) -> str:
    """Strict JSON on one line: no NaN, no Infinity."""
    return json.dumps(value, allow_nan=False)


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    text = json.dumps(value, allow_nan=False, indent=1)
    write_atomically(path, text + "\n", durable=durable)


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, or {} where there is none yet."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_atomically(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """The old file or the whole new one is there at any moment; `durable` also survives a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
