"""metrics.jsonl: complete up to any checkpoint, cut back to the one that a run resumes from."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

from dist_train.atomic_files import parse_object, to_json, write_atomically

_log = logging.getLogger(__name__)


class MetricsFile:
    """Appended to by rank zero alone. Making the object touches nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.discarded = path.with_suffix(".discarded.jsonl")  # the lines that `cut` sets aside, as they were
        self._waiting: list[str] = []

    def append(self, line: Mapping[str, Any]) -> None:
        """Write a line, after those that wait for a disk that was full.

        Raises:
            OSError: not written; the line waits too.
            ValueError: not a number in it.
        """
        self._waiting.append(to_json(line) + "\n")
        self._flush()

    def sync(self) -> None:
        """See that all lines are on the disk: no checkpoint may be newer than its metrics.

        Raises:
            OSError: they are not.
        """
        self._flush()
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def read(self) -> Iterator[dict[str, Any]]:
        """The lines in order; what a kill or a power cut has left of others is passed over."""
        yield from filter(None, map(_parse, self._lines()))

    def follow(self, until: Callable[[], bool], every_s: float = 0.5) -> Iterator[dict[str, Any]]:
        """The lines in order, and those that are still to come; a step that is made again comes again.

        `until`: whether nobody writes any more.
        """
        shown: list[bytes] = []
        seen: tuple[int, int] | None = None
        ended = False
        while True:
            if (version := self._version()) != seen:
                seen, lines = version, self._lines()
                same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(shown, lines, strict=False)))
                yield from filter(None, map(_parse, lines[same:]))
                shown = lines
            if ended:
                return
            time.sleep(every_s)
            ended = until()  # then once more: a last line may have come just before

    def cut(self, step: int, *, evaluation_pending: bool = False) -> int:
        """Set aside the lines after `step`, which the resumed run writes again. Returns how many.

        `evaluation_pending`: so is the `val` line of `step` itself, which an earlier resume may have written.
        A damaged line before that costs no other: it is set aside too, and named.
        """

        def comes_again(line: Mapping[str, Any]) -> bool:
            return line["step"] > step or (evaluation_pending and line["step"] == step and "val/loss" in line)

        lines = self._lines()
        found = [_parse(line) for line in lines]
        first = next((place for place, line in enumerate(found) if line and comes_again(line)), len(lines))
        if first == len(lines):
            while first and found[first - 1] is None:  # what a kill or a power cut has left
                first -= 1
        damaged = [place for place in range(first) if found[place] is None]
        kept = [line for line, whole in zip(lines[:first], found, strict=False) if whole]
        if aside := [*(lines[place] for place in damaged), *lines[first:]]:
            with self.discarded.open("ab") as file:
                file.write(b"".join(aside).rstrip(b"\n") + b"\n")
                file.flush()
                os.fsync(file.fileno())
            write_atomically(self.path, b"".join(kept))
        if damaged:
            numbers = ", ".join(str(place + 1) for place in damaged)
            _log.warning("%s was damaged in line %s: set aside in %s", self.path, numbers, self.discarded.name)
        return len(lines) - first

    def _version(self) -> tuple[int, int] | None:
        """Another one after each append and each cut."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_size

    def _lines(self) -> list[bytes]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            return file.readlines()

    def _flush(self) -> None:
        if not self._waiting:
            return
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(self._waiting))
        except OSError:
            with suppress(OSError):
                os.truncate(self.path, size)  # a disk that fills up takes half a line
            raise
        self._waiting.clear()


def _parse(line: bytes) -> dict[str, Any] | None:
    """A line of metrics, None if it is not a whole one."""
    try:
        found = parse_object(line)
    except ValueError:
        return None
    return found if line.endswith(b"\n") and type(found.get("step")) is int else None
