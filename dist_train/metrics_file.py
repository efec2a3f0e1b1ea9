"""metrics.jsonl: complete up to any checkpoint, cut back to the one that a run resumes from."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

from dist_train.small_files import to_json, write_atomically


class MetricsFile:
    """Appended to by rank zero alone. Making the object touches nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.discarded = path.with_suffix(".discarded.jsonl")  # the lines that `cut` sets aside
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
        yield from map(json.loads, self._whole_lines())

    def follow(self, until: Callable[[], bool], every_s: float = 0.5) -> Iterator[dict[str, Any]]:
        """The lines in order, and those that are still to come; a step that is made again comes again.

        `until`: whether nobody writes any more.
        """
        shown: list[str] = []
        seen: tuple[int, int] | None = None
        ended = False
        while True:
            if (version := self._version()) != seen:
                seen, lines = version, self._whole_lines()
                same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(shown, lines, strict=False)))
                yield from map(json.loads, lines[same:])
                shown = lines
            if ended:
                return
            time.sleep(every_s)
            ended = until()  # then once more: a last line may have come just before

    def cut(self, step: int, *, evaluation_pending: bool = False) -> int:
        """Set aside the lines after `step`, which the resumed run writes again. Returns how many.

        `evaluation_pending`: so is the `val` line of `step` itself, which an earlier resume may have written.
        """
        lines = self._lines()
        good = 0  # up to the first line that is later, or no line at all: a kill or a power cut may have left anything
        while good < len(lines) and _step_of(lines[good]) <= step:
            if evaluation_pending and _step_of(lines[good]) == step and "val/loss" in json.loads(lines[good]):
                break
            good += 1
        if cut := lines[good:]:
            with self.discarded.open("a", encoding="utf-8") as file:
                file.write("".join(cut).rstrip("\n") + "\n")
            write_atomically(self.path, "".join(lines[:good]))
        return len(cut)

    def _version(self) -> tuple[int, int] | None:
        """Another one after each append and each cut."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_size

    def _lines(self) -> list[str]:
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        return text.splitlines(keepends=True)

    def _whole_lines(self) -> list[str]:
        return [line for line in self._lines() if _step_of(line) < math.inf]

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


def _step_of(line: str) -> float:
    """The step of a line of metrics, infinite if it is not a whole one."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
