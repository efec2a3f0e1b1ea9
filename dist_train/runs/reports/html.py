"""A comparison as one HTML file that opens without a network."""

from __future__ import annotations

import base64
import html
import logging
from collections.abc import Sequence

from dist_train.errors import DistTrainError
from dist_train.runs.reports.charts import AXES, learning_curves
from dist_train.runs.reports.compare import Axis, LoadedRun, Table, value_of

_log = logging.getLogger(__name__)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; } th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }
th { white-space: nowrap; } td:first-child, th:first-child { text-align: left; white-space: nowrap; }
td.best { font-weight: 700; background: #e6f4e6; } img { max-width: 100%; }
"""


def to_html(runs: Sequence[LoadedRun], tables: Sequence[Table]) -> str:
    """Return a page of the tables and, if matplotlib is installed, curves. `data-value` holds a cell's full number."""
    title = f"{len(runs)} runs" if len(runs) > 1 else runs[0].name
    parts = [_table(table) for table in tables]
    try:
        parts += [_curves(runs, axis) for axis in AXES]
    except DistTrainError as error:  # matplotlib is not installed
        _log.warning("The page has no curves. %s", error)
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{html.escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _curves(runs: Sequence[LoadedRun], axis: Axis) -> str:
    picture = base64.b64encode(learning_curves(runs, axis)).decode()
    name = f"Learning curves over {axis}"
    return f'<h2>{name}</h2>\n<img alt="{name}" src="data:image/png;base64,{picture}">'


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    rows = []
    for row in table.rows:
        cells = []
        for column, cell in zip(table.columns, row, strict=True):
            best = ' class="best"' if table.is_best(column, cell) else ""
            value = "" if cell is None else html.escape(str(value_of(cell)))
            cells.append(f'<td{best} data-value="{value}">{html.escape(table.text_of(column, cell))}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    lines = "\n".join(rows)
    return (
        f'<h2>{html.escape(table.title)}</h2>\n<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{lines}\n</tbody>\n</table></div>"
    )
