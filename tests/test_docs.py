"""Every row of a table in docs/ names existing tests, and every recipe existing settings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from dist_train.config.loading import load_config
from support.processes import ROOT


def tables(text: str) -> Iterator[list[dict[str, str]]]:
    """Yield the tables of a Markdown file, each with a dictionary for each row."""
    for block in re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE):
        header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        yield [dict(zip(header, row, strict=True)) for row in rows]


def names_of_tests() -> set[str]:
    trees = [ast.parse(path.read_text()) for path in (ROOT / "tests").rglob("test_*.py")]
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", ["faults.md", "cluster.md", "web.md", "queue.md"])
def test_each_row_names_its_test(page: str) -> None:
    """Or says why there is none."""
    known = names_of_tests()
    rows = [row for table in tables((ROOT / "docs" / page).read_text()) for row in table]
    assert len(rows) > 3
    tests_of_rows = [(row, re.findall(r"`(\w+)`", row.get("test", ""))) for row in rows]
    assert [row for row, tests in tests_of_rows if set(tests) - known or not (tests or _is_reason(row))] == []


def _is_reason(row: dict[str, str]) -> bool:
    return row.get("test", "").startswith("why not: ")


def test_each_recipe_is_made_of_settings() -> None:
    """Those of a row together; or it is a command."""
    recipes, lines_elsewhere = tables((ROOT / "docs" / "recipes.md").read_text())
    assert len(recipes) == len(lines_elsewhere) > 10
    for row in recipes:
        written = [text.strip("'") for text in re.findall(r"`([^`]+)`", row["what you write"])]
        assert written
        if not written[0].startswith("dist-train "):
            load_config("mnist_mlp", written)


def test_rows_of_table() -> None:
    (first,) = tables("| what | test |\n|---|---|\n| a | `test_a` |\n| b | - |\n")
    assert first == [{"what": "a", "test": "`test_a`"}, {"what": "b", "test": "-"}]
