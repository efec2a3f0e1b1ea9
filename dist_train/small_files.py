"""Small files that others read while we write them: whole or not at all, and strict JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dist_train.atomic_files import whole


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
    """As `whole`."""
    with whole(path, durable=durable) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
