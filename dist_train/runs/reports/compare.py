"""Comparison of runs: results, differing settings, and mean and deviation over the seeds of an experiment."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from dist_train.config.loading import load_config
from dist_train.config.metric_names import direction
from dist_train.config.schema import Config
from dist_train.errors import DistTrainError
from dist_train.runs.accuracy_text import is_share
from dist_train.runs.further_metrics import further_metrics
from dist_train.runs.summary import Summary, summarise_existing

Axis = Literal["step", "samples", "seconds"]

_NOT_COMPARED = ("runs_dir", "tracking.")  # prefixes of settings


@dataclass(frozen=True)
class Mean:
    """A mean over the seeds of an experiment."""

    mean: float
    deviation: float | None  # None: only one seed


Cell = str | float | Mean | None


@dataclass(frozen=True)
class Metric:
    """A column of the comparison."""

    name: str
    of: Callable[[LoadedRun], float | None]
    form: str  # format spec for text tables
    best: Callable[[Sequence[float]], float] | None = None  # max or min; None: neither is better


@dataclass(frozen=True)
class LoadedRun:
    """A run with its settings and all of its metrics."""

    summary: Summary
    config: Config | None  # None: missing or unreadable
    lines: list[dict[str, Any]] = field(repr=False)  # of metrics.jsonl

    @property
    def name(self) -> str:
        return self.summary.name

    @property
    def experiment(self) -> str:
        """A key that is equal for runs that differ only in their seed or in settings that cannot change the result."""
        if self.config is None:
            return self.name
        return json.dumps({key: value for key, value in self.config.result_settings().items() if key != "seed"})

    @property
    def seed(self) -> int | None:
        return self.config.seed if self.config else None

    def last(self, key: str) -> float | None:
        """Return the newest value of a metric."""
        return next((line[key] for line in reversed(self.lines) if line.get(key) is not None), None)

    @property
    def best_accuracy(self) -> float | None:
        return max((each for line in self.lines if (each := line.get("val/accuracy")) is not None), default=None)

    @property
    def accuracy_is_share(self) -> bool:
        return is_share(self.summary.result, "test") and all(is_share(line, "val") for line in self.lines)

    def curve(self, key: str, axis: Axis) -> tuple[list[float], list[float]]:
        """Return the positions on the axis and the values there."""
        positions = self._seconds if axis == "seconds" else [line.get(axis) for line in self.lines]
        pairs = [(x, line.get(key)) for x, line in zip(positions, self.lines, strict=True)]
        points = [(x, y) for x, y in pairs if x is not None and y is not None]
        return [x for x, _ in points], [y for _, y in points]

    @cached_property
    def further(self) -> dict[str, list[str]]:
        """The names of the metrics besides loss and accuracy, by split."""
        lines = (self.summary.result, *self.lines)
        return {
            split: list(dict.fromkeys(name for line in lines for name in further_metrics(line, split)))
            for split in ("test", "val")
        }

    @cached_property
    def _seconds(self) -> list[float]:
        """Seconds from the first line to each line, without the time between attempts."""
        seconds, attempt, before = 0.0, None, 0.0
        result = []
        for line in self.lines:
            time = line.get("time", before)  # a damaged line may lack it
            if line.get("attempt") == attempt:
                seconds += max(0.0, time - before)
            attempt, before = line.get("attempt"), time
            result.append(seconds)
        return result


_SHARE = ".2%"  # the form of an accuracy, unless a net calls another metric so
METRICS = (
    Metric("test accuracy", lambda run: run.summary.test_accuracy, _SHARE, max),
    Metric("best val accuracy", lambda run: run.best_accuracy, _SHARE, max),
    Metric("val loss", lambda run: run.last("val/loss"), ".4f", min),
    Metric("train loss", lambda run: run.last("train/loss"), ".4f", min),
    Metric("steps", lambda run: run.summary.step, ".0f"),
    Metric("training, s", lambda run: run.summary.result.get("train_s"), ".1f", min),
    Metric("samples/s", lambda run: run.summary.samples_per_s, ",.0f", max),
)


def metrics_of(runs: Sequence[LoadedRun]) -> list[Metric]:
    """Return the columns for these runs: `METRICS`, and after the accuracies the further metrics that any run has."""
    found = {(split, name): None for split in ("test", "val") for run in runs for name in run.further[split]}
    if all(run.summary.test_accuracy is None for run in runs):
        found[("test", "loss")] = None
    modes = {run.config.best_by: run.config.best_is for run in runs if run.config and run.config.best_by}
    if "val/loss" in modes:
        found[("val", "loss")] = None
    further = [_further(split, name, modes.get(f"val/{name}") or direction(name)) for split, name in found]
    return [*METRICS[:2], *further, *METRICS[2:]]


def _further(split: str, name: str, mode: str | None) -> Metric:
    """Return the column of the value at the end; on val of the best one, if it is known which is better."""
    key, better = f"{split}/{name}", {"max": max, "min": min, None: None}[mode]
    if split == "test":
        return Metric(f"test {name}", lambda run: run.summary.result.get(key), ".4g", better)
    if better is None:
        return Metric(f"val {name}", lambda run: run.last(key), ".4g")
    return Metric(f"best val {name}", lambda run: better(run.curve(key, "step")[1], default=None), ".4g", better)


def read_run(path: Path) -> LoadedRun:
    """Read a run with its settings and metrics.

    Raises:
        RunDirError: `path` is not a run directory.
    """
    summary = summarise_existing(path)
    try:
        config = load_config(str(summary.run_dir.config))
    except (DistTrainError, OSError):
        config = None
    return LoadedRun(summary, config, list(summary.run_dir.metrics.read()))


@dataclass(frozen=True)
class Table:
    """A table with exact cell values and the formatting for text output."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    forms: dict[str, str]  # by column, the format spec of its numbers
    best: dict[str, float]  # by column, the value to mark

    def text_of(self, column: str, cell: Cell) -> str:
        if cell is None:
            return "-"
        form = self.forms.get(column, "")
        if isinstance(cell, Mean):
            spread = "" if cell.deviation is None else f" ± {cell.deviation:{form}}"
            return f"{cell.mean:{form}}{spread}"
        return format(cell, form) if isinstance(cell, (int, float)) else cell

    def is_best(self, column: str, cell: Cell) -> bool:
        return cell is not None and self.best.get(column) == value_of(cell)

    def texts(self, mark: Callable[[str], str]) -> list[list[str]]:
        """Return the rows as text. `mark` formats the best cell of a column."""
        return [
            [
                mark(self.text_of(column, cell)) if self.is_best(column, cell) else self.text_of(column, cell)
                for column, cell in zip(self.columns, row, strict=True)
            ]
            for row in self.rows
        ]


def value_of(cell: Cell) -> str | float | None:
    """Return a cell's number (the mean if it has several seeds) or its text."""
    return cell.mean if isinstance(cell, Mean) else cell


def compare(runs: Sequence[LoadedRun], sort: str | None = None) -> list[Table]:
    """Return the table of runs and, if an experiment has several seeds, the table of experiments.

    The best run comes first: by the metric named `sort`, else by `best_by`, if it is the same in all runs, else by the
    first that any run has.
    """
    runs = sort_runs(runs, sort)
    return [table for table in (run_table(runs), seed_table(runs)) if table is not None]


def sort_runs(runs: Sequence[LoadedRun], sort: str | None = None) -> list[LoadedRun]:
    """Return the runs as `compare` orders them. Runs without the metric come last, in the given order."""
    ranked = [metric for metric in metrics_of(runs) if metric.best is not None]
    deciding = {run.config.best_by for run in runs if run.config} if sort is None else set()
    names = {sort} if sort else {f"best val {name.removeprefix('val/')}" for name in deciding if name}
    candidates = [metric for metric in ranked if {metric.name} == names] or ranked
    for metric in candidates:
        values = {run.summary.run_dir.path: metric.of(run) for run in runs}
        if any(value is not None for value in values.values()):
            sign = -1 if metric.best is max else 1

            def key(run: LoadedRun, values: Mapping[Path, float | None] = values, sign: int = sign) -> float:
                value = values[run.summary.run_dir.path]
                return math.inf if value is None else sign * value

            return sorted(runs, key=key)
    return list(runs)


def run_table(runs: Sequence[LoadedRun]) -> Table:
    """Return a table with one row for each run: its state, its metrics, the settings that differ between runs."""
    settings, metrics = differing_settings(runs), metrics_of(runs)
    rows: list[list[Cell]] = []
    for number, run in enumerate(runs):
        own = [values[number] for values in settings.values()]
        rows.append([run.name, run.summary.state, *(metric.of(run) for metric in metrics), *own])
    return _table("runs", ["run", "state", *(metric.name for metric in metrics), *settings], rows, runs)


def seed_table(runs: Sequence[LoadedRun]) -> Table | None:
    """Return a table with mean and deviation over each experiment's finished seeds. None if each has only one seed."""
    finished = [run for run in runs if run.summary.state == "FINISHED"]
    # Each seed counts once: a repeated one adds no information.
    groups = [list({run.seed: run for run in reversed(group)}.values())[::-1] for group in group_seeds(finished)]
    if all(len(group) == 1 for group in groups):
        return None
    firsts = [group[0] for group in groups]
    settings = {key: values for key, values in differing_settings(firsts).items() if key != "seed"}
    metrics = [metric for metric in metrics_of(finished) if metric.best]
    columns = ["first run", "finished seeds", *(metric.name for metric in metrics), *settings]
    rows: list[list[Cell]] = []
    for number, group in enumerate(groups):
        row: list[Cell] = [group[0].name, len(group)]
        for metric in metrics:
            results = [value for run in group if (value := metric.of(run)) is not None]
            deviation = statistics.stdev(results) if len(results) > 1 else None
            row.append(Mean(statistics.mean(results), deviation) if results else None)
        rows.append([*row, *(values[number] for values in settings.values())])
    return _table("seeds of one experiment: mean ± standard deviation", columns, rows, finished)


def _table(title: str, columns: list[str], rows: list[list[Cell]], runs: Sequence[LoadedRun]) -> Table:
    metrics = metrics_of(runs)
    forms = {metric.name: metric.form for metric in metrics}
    if not all(run.accuracy_is_share for run in runs):
        forms = {name: "g" if form == _SHARE else form for name, form in forms.items()}
    best: dict[str, float] = {}
    for metric in metrics:
        if metric.best and metric.name in columns and len(rows) > 1:
            index = columns.index(metric.name)
            values = [value for row in rows if isinstance(value := value_of(row[index]), (int, float))]
            if len(values) > 1:
                best[metric.name] = metric.best(values)
    return Table(title, columns, rows, {name: form for name, form in forms.items() if name in columns}, best)


def differing_settings(runs: Sequence[LoadedRun]) -> dict[str, list[Cell]]:
    """Return the settings that differ between runs, with the value of each run. None where a run lacks the setting.

    Settings of the run location and of tracking are left out.
    """
    flat = [run.config.flat() if run.config else {} for run in runs]
    known = [settings for settings in flat if settings]
    names = dict.fromkeys(name for settings in known for name in settings if not name.startswith(_NOT_COMPARED))
    differing = [name for name in names if any(settings.get(name) != known[0].get(name) for settings in known)]
    return {name: [_cell(settings.get(name)) for settings in flat] for name in differing}


def _cell(value: Any) -> Cell:
    return (
        value
        if value is None or (isinstance(value, (str, int, float)) and not isinstance(value, bool))
        else json.dumps(value)
    )


def group_seeds(runs: Sequence[LoadedRun]) -> list[list[LoadedRun]]:
    """Group the runs by experiment, in the order of each experiment's first run."""
    groups: dict[str, list[LoadedRun]] = {}
    for run in runs:
        groups.setdefault(run.experiment, []).append(run)
    return list(groups.values())


# --- as text -----------------------------------------------------------------------------------------------------


def to_markdown(tables: Sequence[Table]) -> str:
    parts = []
    for table in tables:
        rows = [table.columns, ["---"] * len(table.columns), *table.texts(mark="**{}**".format)]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        parts.append("\n".join([f"### {table.title}", "", *lines]))
    return "\n\n".join(parts) + "\n"


def to_csv(table: Table) -> str:
    """Return the table as CSV, with full numbers. A CSV file holds one table."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(["" if cell is None else value_of(cell) for cell in row] for row in table.rows)
    return out.getvalue()


def to_json(tables: Sequence[Table]) -> str:
    """Return the tables as JSON: {title: [{column: value}]}."""
    result = {table.title: [dict(zip(table.columns, row, strict=True)) for row in table.rows] for table in tables}
    return json.dumps(result, indent=1, allow_nan=False, default=asdict) + "\n"
