"""A comparison written to files, in the format that each file's name asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dist_train.errors import ConfigError, DistTrainError, RunDirError
from dist_train.runs.reports.charts import learning_curves
from dist_train.runs.reports.compare import Axis, LoadedRun, compare, to_csv, to_json, to_markdown
from dist_train.runs.reports.html import to_html


def write_comparison(runs: Sequence[LoadedRun], files: Sequence[Path], axis: Axis) -> Iterator[Path]:
    """Write .md, .csv, .json, .png and .html files; yields each that is written. `axis`: of the curves in a .png.

    Raises:
        ConfigError: A file of another kind (nothing is written), or, after the other files, one that needs matplotlib
            where it is not installed.
        RunDirError: A file cannot be written.
    """
    tables = compare(runs)
    writers: dict[str, Callable[[], str | bytes]] = {
        ".md": lambda: to_markdown(tables),
        ".csv": lambda: to_csv(tables[0]),
        ".json": lambda: to_json(tables),
        ".png": lambda: learning_curves(runs, axis),
        ".html": lambda: to_html(runs, tables),
    }
    for file in files:
        if file.suffix not in writers:
            raise ConfigError(f"--out={file}: a comparison can be written as {', '.join(writers)}.")
    failed: DistTrainError | None = None
    for file in files:
        try:
            content = writers[file.suffix]()
        except DistTrainError as error:
            failed = type(error)(f"{file} was not written. {error}")
            continue
        try:
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
        except OSError as error:
            raise RunDirError(f"{file} cannot be written: {error.strerror}.") from None
        yield file
    if failed is not None:
        raise failed
