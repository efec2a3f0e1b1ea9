"""metrics.jsonl: complete up to every checkpoint, and truncated to the checkpoint that a run resumes from."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

from dist_train.atomic_files import fsync, open_regular, parse_object, to_json, write_atomically

_POSITION = ("step", "epoch", "samples", "attempt", "time", "epoch_s")
_LARGEST = sys.float_info.max
_log = logging.getLogger(__name__)


class MetricsFile:
    """The metrics file of a run. Only rank zero appends to it. The constructor does no I/O."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.discarded = path.with_suffix(".discarded.jsonl")  # the lines that `cut` removes, unchanged
        self._pending: list[str] = []

    def append(self, line: Mapping[str, Any]) -> None:
        """Write a line, after lines that are pending because the disk was full.

        Raises:
            OSError: the line is not written; it stays pending.
            ValueError: the line holds NaN or infinity.
        """
        self._pending.append(to_json(line) + "\n")
        self.flush()

    def flush(self) -> None:
        """Write the lines that are pending.

        Raises:
            OSError: a line could not be written.
        """
        if not self._pending:
            return
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(self._pending))
        except OSError:
            with suppress(OSError):
                os.truncate(self.path, size)  # a disk that fills up may accept half a line
            raise
        self._pending.clear()

    def sync(self) -> None:
        """Wait until all lines that were written are on the disk. May be called from another thread than `append`.

        Raises:
            OSError: they may not be.
        """
        if self.path.exists():
            fsync(self.path)

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the lines in order, without lines that a kill or a power cut left incomplete."""
        yield from filter(None, map(parse_line, self._lines()))

    def follow(self, until: Callable[[], bool], every_s: float = 0.5) -> Iterator[dict[str, Any]]:
        """Yield the lines in order, then new lines as they are written; a step that is repeated is yielded again.

        `until` returns True when no process writes to the file any more.
        """
        shown: list[bytes] = []
        seen: tuple[int, int] | None = None
        ended = False
        while True:
            if (version := self._version()) != seen:
                seen, lines = version, self._lines()
                same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(shown, lines, strict=False)))
                yield from filter(None, map(parse_line, lines[same:]))
                shown = lines
            if ended:
                return
            time.sleep(every_s)
            ended = until()  # then read once more: a last line may have been written just before

    def cut(self, step: int, *, evaluation_pending: bool = False) -> int:
        """Move the lines after `step`, which the resumed run writes again, to `discarded`. Return their number.

        With `evaluation_pending` the `val` line of `step` itself goes too: an earlier resume may have written it.
        Damaged lines before that are moved and reported too; the intact lines around them stay.
        """

        def is_written_again(line: Mapping[str, Any]) -> bool:
            return line["step"] > step or (evaluation_pending and line["step"] == step and "val/loss" in line)

        lines = self._lines()
        parsed = [parse_line(line) for line in lines]
        first = next((index for index, line in enumerate(parsed) if line and is_written_again(line)), len(lines))
        if first == len(lines):
            while first and parsed[first - 1] is None:  # left by a kill or a power cut
                first -= 1
        damaged = [index for index in range(first) if parsed[index] is None]
        kept = [line for line, intact in zip(lines[:first], parsed, strict=False) if intact]
        if removed := [*(lines[index] for index in damaged), *lines[first:]]:
            with self.discarded.open("ab") as file:
                file.write(b"".join(removed).rstrip(b"\n") + b"\n")
                file.flush()
                os.fsync(file.fileno())
            write_atomically(self.path, b"".join(kept))
        if damaged:
            numbers = ", ".join(str(index + 1) for index in damaged)
            _log.warning("%s was damaged in line %s: moved to %s", self.path, numbers, self.discarded.name)
        return len(lines) - first

    def _version(self) -> tuple[int, int] | None:
        """Return a value that changes with each append and each cut."""
        try:
            stat = self.path.stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_size

    def _lines(self) -> list[bytes]:
        if not self.path.is_file():
            return []
        with open_regular(self.path) as file:
            return file.readlines()


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Parse a line of metrics, without metrics that are no numbers. Return None if it is incomplete or damaged."""
    try:
        entries = parse_object(line)
    except ValueError:
        return None
    intact = {name: value for name, value in entries.items() if _is_intact(name, value)}
    return intact if line.endswith(b"\n") and type(intact.get("step")) is int else None


def _is_intact(name: str, value: Any) -> bool:
    """Whether an entry is a number, or undefined, where a reader expects one."""
    is_metric = "/" in name or name in _POSITION
    return not is_metric or value is None or (isinstance(value, (int, float)) and -_LARGEST <= value <= _LARGEST)
