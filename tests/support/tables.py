"""The tables of docs/cluster.md and docs/faults.md: rows recorded by tests, printed at the end of a session."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import pytest

Row = list[str]
TARGETS = ("all", "rank 0", "another rank", "torchrun", "launcher")


def tables_of(reports: Iterable[pytest.TestReport]) -> Iterator[tuple[str, list[Row]]]:
    """Yield (title, rows with the header first) from the records of passed tests, in file order."""
    found: dict[str, list[Row]] = {}
    for report in sorted(reports, key=lambda report: report.location[:2]):
        for name, value in report.user_properties:
            if name == "row":
                title, columns, cells = _as_row(value)
                found.setdefault(title, [columns]).append(cells)
    for title, rows in found.items():
        yield title, kills_by_phase(rows) if title == "kills" else rows


def _as_row(value: Any) -> tuple[str, Row, Row]:
    title, columns, cells = value
    return title, columns, cells


def kills_by_phase(rows: list[Row]) -> list[Row]:
    """Summarise rows (phase, point, target, processes, seconds, test): one row per phase and one for all."""
    _, *kills = rows
    header = ["phase", "kills", "on 3 processes", *TARGETS, "last process gone after (max)", "test"]
    kills.sort(key=lambda row: row[0])
    phases = [(phase, list(those)) for phase, those in groupby(kills, key=lambda row: row[0])]
    return [header, *(_summary(phase, those) for phase, those in [*phases, ("all", kills)])]


def _summary(phase: str, kills: list[Row]) -> Row:
    counts = [len(kills), sum(row[3] == "3" for row in kills), *(sum(row[2] == t for row in kills) for t in TARGETS)]
    longest = max(float(row[4].removesuffix(" s")) for row in kills)
    return [phase, *map(str, counts), f"{longest:.1f} s", kills[0][-1]]
