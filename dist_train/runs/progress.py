"""Progress output of a run: a live bar on a terminal, plain lines elsewhere, and one log file for each rank."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dist_train.runs.accuracy_text import accuracy_text
from dist_train.runs.directory import RunDir
from dist_train.runs.further_metrics import further_text

_log = logging.getLogger(__name__)

_LINE_EVERY_S = 5.0  # for plain progress lines; evaluations are always printed
# The table above the live bar, one row for each evaluation. It fits 80 columns.
_COLUMNS = ("epoch", "step", "train loss", "train acc", "val loss", "val acc", "seconds")
_ROW = "{:>7}{:>12}{:>12}{:>11}{:>11}{:>11}{:>10}"


def log_to_screen(rank: int, verbosity: int) -> None:
    """Log to the screen on rank zero, even before a run directory exists. `verbosity`: -1 quiet, 0, 1 verbose."""
    logger = logging.getLogger("dist_train")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    for old in list(logger.handlers):
        logger.removeHandler(old)
        old.close()
    if rank == 0:
        screen = _ScreenHandler()
        screen.setLevel({-1: logging.WARNING, 0: logging.INFO}.get(verbosity, logging.DEBUG))
        logger.addHandler(screen)


def log_to_file(run_dir: RunDir, rank: int) -> None:
    """Also write all log records to this rank's log file."""
    file = _FileHandler(run_dir.rank_log(rank), encoding="utf-8")
    file.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(message)s"))
    logging.getLogger("dist_train").addHandler(file)
    logging.captureWarnings(True)  # Python warnings go to the log file, not over the bar
    logging.getLogger("py.warnings").handlers = [file]
    logging.getLogger("py.warnings").propagate = False


class _FileHandler(logging.FileHandler):
    """Drops lines that cannot be written, on a full disk for example; the screen still shows them."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class _ScreenHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        _print(prefix + record.getMessage())


_shared_console: Console | None = None


def _console() -> Console:
    """Return the console that bar and lines share, so that they do not overwrite each other."""
    global _shared_console
    # While the bar is shown, sys.stdout is a proxy of rich.
    stdout = getattr(sys.stdout, "rich_proxied_file", sys.stdout)
    if _shared_console is None or _shared_console.file is not stdout:
        _shared_console = Console(file=stdout)
    return _shared_console


class Screen:
    """Progress display of a run. `shown` is False on all ranks but zero and with --quiet: then nothing is printed."""

    def __init__(self, total_steps: int, steps_per_epoch: int, *, shown: bool) -> None:
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self._shown = shown
        self._last_line = time.monotonic()
        self._last_train_line: dict[str, Any] = {}
        self._header_printed = False  # of the table of evaluations
        self._bar: Progress | None = None
        if shown and _console().is_terminal:
            self._bar = Progress(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(bar_width=10),  # the whole line fits 80 columns
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=_console(),
            )

    def __enter__(self) -> Screen:
        if self._bar is not None:
            self._task = self._bar.add_task("", total=self.total_steps, epoch="1", numbers="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show_training(self, line: dict[str, Any]) -> None:
        self._last_train_line = line
        if self._bar is not None:
            epoch = f"{min(line['epoch'], self.total_steps / self.steps_per_epoch):.2f}"
            self._bar.update(self._task, completed=line["step"], epoch=epoch, numbers=_short_numbers(line))
        elif self._shown and time.monotonic() - self._last_line >= _LINE_EVERY_S:
            self._last_line = time.monotonic()
            print(describe(line, self.total_steps), flush=True)

    def show_evaluation(self, line: dict[str, Any]) -> None:
        if self._bar is not None:
            if not self._header_printed:
                _print(_ROW.format(*_COLUMNS))
            self._header_printed = True
            _print(self._row(line))
        _log.log(logging.INFO if self._bar is None else logging.DEBUG, "%s", describe(line, self.total_steps))

    def _row(self, line: dict[str, Any]) -> str:
        cells = [f"{line['epoch']:.2f}", f"{line['step']}"]
        for source, split in ((self._last_train_line, "train"), (line, "val")):
            loss = source.get(f"{split}/loss")
            cells += ["-" if loss is None else f"{loss:.4f}", accuracy_text(source, split) or "-"]
        return "  ".join([_ROW.format(*cells, f"{line['epoch_s']:.1f}"), *further_text(line, "val")])


def _print(text: str) -> None:
    """Print a line, above the live bar if there is one."""
    _console().print(text, markup=False, highlight=False, soft_wrap=True)


def _short_numbers(line: dict[str, Any]) -> str:
    accuracy = accuracy_text(line, "train")
    shown = f"  {accuracy}" if accuracy else ""
    speed = f"  {line['perf/samples_per_s']:,.0f}/s" if "perf/samples_per_s" in line else ""
    return f"loss {line['train/loss']:.4f}{shown}  lr {line['train/lr']:.1e}{speed}"


def describe(line: dict[str, Any], total_steps: int | None) -> str | None:
    """Format a line of metrics for the screen. Return None if it holds neither training nor evaluation metrics."""
    unknown = float("nan")  # a damaged line may lack an entry
    position = f"step {line['step']}/{total_steps or '?'}  epoch {line.get('epoch', unknown):.2f}"
    if "train/loss" in line:
        return f"{position}  {_numbers(line, 'train')}"
    if "val/loss" in line:
        return f"{position}  val {_numbers(line, 'val')}  epoch time {line.get('epoch_s', unknown):.1f} s"
    return None


def _numbers(line: dict[str, Any], split: str) -> str:
    parts = [f"loss {line[f'{split}/loss']:.4f}"]
    if accuracy := accuracy_text(line, split, unit=" %"):
        parts.append(f"accuracy {accuracy}")
    if split != "train":  # a training line has lr and others there
        parts += further_text(line, split)
    if "train/lr" in line:
        parts.append(f"lr {line['train/lr']:.2e}")
    if "perf/samples_per_s" in line:
        parts.append(f"{line['perf/samples_per_s']:,.0f} samples/s")
    return "  ".join(parts)
