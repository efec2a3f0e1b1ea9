"""The metrics of runs for the page: read once, then only what was appended."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from dist_train.atomic_files import open_regular
from dist_train.runs.metrics_log import parse_line

MAX_POINTS = 2000  # of a curve; of more training lines, every n-th is sent
_KEPT_RUNS = 16
_AXES = ("step", "samples", "epoch", "time")


@dataclass
class _Read:
    inode: int = 0
    offset: int = 0
    lines: list[dict[str, Any]] = field(default_factory=list)


class MetricsCache:
    """The metric lines of the runs that were looked at last. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_path: OrderedDict[Path, _Read] = OrderedDict()

    def lines(self, path: Path) -> tuple[list[dict[str, Any]], int]:
        """Return the lines of a metrics.jsonl, and a number that changes when a resume has cut the file."""
        with self._lock:
            read = self._by_path.pop(path, None) or _Read()
            try:
                with open_regular(path) as file:
                    read = _refresh(read, file)
            except OSError:
                read = _Read()
            self._by_path[path] = read
            while len(self._by_path) > _KEPT_RUNS:
                self._by_path.popitem(last=False)
            return read.lines, read.inode


def _refresh(read: _Read, file: BinaryIO) -> _Read:
    stat = os.fstat(file.fileno())
    if stat.st_ino != read.inode or stat.st_size < read.offset:
        read = _Read(stat.st_ino)
    file.seek(read.offset)
    content = file.read(stat.st_size - read.offset)
    complete = content[: content.rfind(b"\n") + 1]
    new = [line for text in complete.splitlines(keepends=True) if (line := parse_line(text)) is not None]
    # A new list: another thread may be reading the old one.
    return _Read(read.inode, read.offset + len(complete), read.lines + new)


def points(lines: list[dict[str, Any]], start: int) -> Iterator[dict[str, float]]:
    """Yield the numbers of the lines from `start` on that a curve can show."""
    new = lines[start:]
    every = max(1, sum("train/loss" in line for line in new) // MAX_POINTS)
    for number, line in enumerate(new):
        if "train/loss" in line and "val/loss" not in line and number % every:
            continue
        yield {
            key: value
            for key, value in line.items()
            if (key in _AXES or key.startswith(("train/", "val/"))) and value is not None
        }
