"""What the page of one run shows."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from dist_train.atomic_files import open_regular
from dist_train.checkpoints.contents import MODEL
from dist_train.checkpoints.manifest import by_score, manifests
from dist_train.config.loading import bundled_configs, load_config
from dist_train.config.schema import Config
from dist_train.errors import DistTrainError
from dist_train.launch.resume import start_log
from dist_train.runs.directory import RunDir
from dist_train.runs.error_report import describe_error
from dist_train.runs.further_metrics import further_metrics
from dist_train.runs.start_lock import has_failed_to_start
from dist_train.runs.time_accounting import effective_ratio
from dist_train.web.outputs import files_in
from dist_train.web.run_index import Entry

_LOG_LINES = 20  # of a failed rank
_LOG_BYTES = 16_384  # of a failure


@dataclass
class Epoch:
    """A row of the table of evaluations and snapshots."""

    step: int
    epoch: float | None = None
    seconds: float | None = None
    train_loss: float | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)  # keys val/...; empty for a snapshot between evaluations
    snapshot: bool = False
    is_best: bool = False


@dataclass(frozen=True)
class Failure:
    what: str  # with rank and host
    traceback: str
    log: str  # the last lines of that rank's log
    checkpoint: int | None  # step of the newest one


def epochs(run_dir: RunDir, lines: Sequence[Mapping[str, Any]]) -> list[Epoch]:
    """Return a row for each evaluation and each snapshot, the newest first."""
    rows: dict[int, Epoch] = {}
    train_loss = None
    for line in lines:
        train_loss = line.get("train/loss", train_loss)
        if "val/loss" not in line:
            continue
        metrics = {key: value for key, value in line.items() if key.startswith("val/")}
        rows[line["step"]] = Epoch(line["step"], line.get("epoch"), line.get("epoch_s"), train_loss, metrics)
    found = manifests(run_dir)
    for folder, manifest in found.items():
        rows.setdefault(manifest["step"], Epoch(manifest["step"])).snapshot = (folder / MODEL).is_file()
    for best in by_score(found)[:1]:
        rows[found[best]["step"]].is_best = True
    return [rows[step] for step in sorted(rows, reverse=True)]


def own_metrics(rows: Sequence[Epoch]) -> list[str]:
    """Return the keys of the metrics besides loss and accuracy, val/..."""
    return list(dict.fromkeys(f"val/{name}" for row in rows for name in further_metrics(row.metrics, "val")))


def evaluations_csv(rows: Sequence[Epoch]) -> Iterator[bytes]:
    """Yield the lines of a CSV file with a row for each evaluation, the oldest first: the numbers of the table, exact.

    The columns are named as in metrics.jsonl.
    """
    keys = ["val/loss", "val/accuracy", *own_metrics(rows)]
    yield _csv_line(["epoch", "step", "epoch_s", "train/loss", *keys])
    for row in reversed(rows):
        if row.metrics:
            yield _csv_line([row.epoch, row.step, row.seconds, row.train_loss, *map(row.metrics.get, keys)])


def _csv_line(cells: Sequence[Any]) -> bytes:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue().encode(errors="replace")


def seconds_by_use(entry: Entry) -> tuple[list[tuple[str, float, float]], float]:
    """Return (use, seconds, share) of each use of the wall time, and the share of new steps."""
    seconds = {use: value for use, value in entry.summary.seconds.items() if value > 0}
    total = sum(seconds.values()) or 1.0
    return [(use, value, value / total) for use, value in seconds.items()], effective_ratio(seconds)


def failure(entry: Entry) -> Failure | None:
    """Return why the run ended, where it did not end by itself."""
    run_dir = entry.summary.run_dir
    error = run_dir.read_error()
    if entry.summary.may_be_running or (not error and entry.summary.state != "KILLED"):
        return None
    what = describe_error(error) if error else "Its process is gone, and it left no error: it was killed."
    newest = next(iter(manifests(run_dir).values()), None)
    return Failure(
        what=what,
        traceback=error.get("traceback", ""),
        log="\n".join(_end(run_dir, run_dir.rank_log(error.get("rank", 0)).name).splitlines()[-_LOG_LINES:]),
        checkpoint=newest["step"] if newest else None,
    )


def tail(path: Path, at_most: int, offset: int | None = None) -> tuple[str, int]:
    """Return the text of a log from `offset` on, at most its last `at_most` bytes, and the offset after it."""
    try:
        with open_regular(path) as file:
            end = file.seek(0, 2)
            start = max(0, end - at_most) if offset is None or offset > end else max(offset, end - at_most)
            file.seek(start)
            return file.read(end - start).decode(errors="replace"), end
    except OSError:
        return "", 0


def not_started(entry: Entry) -> str:
    """Return what the last start from the page printed, if it ended before it had a status."""
    run_dir = entry.summary.run_dir
    return _end(run_dir, start_log(run_dir).name) if has_failed_to_start(run_dir) else ""


def _end(run_dir: RunDir, name: str) -> str:
    """Return the end of a log, "" if there is none of that name."""
    path = logs(run_dir).get(name)
    return tail(path, _LOG_BYTES)[0].strip() if path is not None else ""


def accuracy_by_class(entry: Entry) -> list[tuple[str, float | None]]:
    """Return the accuracy of each class on the test set, else on val; [] for a run that has not finished."""
    result = entry.summary.result
    found = result.get("test/accuracy_by_class") or result.get("val/accuracy_by_class") or {}
    return list(found.items())


def logs(run_dir: RunDir) -> dict[str, Path]:
    """Return the logs of a run by name, rank zero first."""
    found = files_in(run_dir, "logs", ".log")
    return {name: found[name] for name in sorted(found, key=lambda name: not name.startswith("rank_"))}


def settings(run_dir: RunDir) -> tuple[str, list[tuple[str, Any, Any]], dict[str, Any]]:
    """Return the name of the bundled config that a run began with (or "the defaults"), the settings that differ from it
    as (name, there, here), and all settings."""
    try:
        config = load_config(str(run_dir.config))
    except (DistTrainError, OSError):
        return "", [], {}
    arguments = run_dir.read_provenance().get("argv", [])
    named = [b for a, b in pairwise(arguments) if a in ("-c", "--config")]
    base = next((name for name in named if name in bundled_configs()), None)
    other = load_config(base).flat() if base else Config(seed=config.seed).flat()
    here = config.flat()
    differing = [
        (name, other.get(name), here.get(name))
        for name in dict.fromkeys((*here, *other))
        if here.get(name) != other.get(name)
    ]
    return base or "the defaults", differing, here
