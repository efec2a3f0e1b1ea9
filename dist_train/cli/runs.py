"""`runs ls|show|tail|stop|compare`: from the files of the runs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dist_train.cli.options import RunPath, print_table
from dist_train.errors import RunDirError

if TYPE_CHECKING:
    from dist_train.runs.summary import Summary

_SORTS = ("name", "age", "progress", "accuracy", "speed", "state")
_run = click.argument("run", type=RunPath())


@click.group()
def runs() -> None:
    """Show and compare runs, live or ended."""


@runs.command("ls")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--in", "folder", type=click.Path(path_type=Path), metavar="FOLDER", help="The folder of runs.")
@click.option(
    "--state", "states", multiple=True, metavar="STATE", help="Only these states: FINISHED, TRAINING, KILLED, ..."
)
@click.option(
    "--sort", default="name", show_default=True, type=click.Choice(_SORTS), help="Sort key, in ascending order."
)
@click.option("--json", "as_json", is_flag=True, help="One line of JSON for each.")
def ls(names: tuple[str, ...], folder: Path | None, states: tuple[str, ...], sort: str, as_json: bool) -> None:
    """List runs. NAME may contain * and ?."""
    from dist_train.config.paths import runs_root
    from dist_train.launch.job_queue import places, waiting_jobs
    from dist_train.launch.jobs import unfinished_jobs
    from dist_train.runs.further_metrics import further_metrics
    from dist_train.runs.summary import find_runs, select_runs

    if folder is not None and not folder.is_dir():  # a typo; the default one is created by the first run
        raise RunDirError(f"--in={folder}: there is no such folder.")
    folder = folder or runs_root()
    found = select_runs(folder, [Path(name).name for name in names], states, sort)  # paths are taken too
    if not found:
        empty = next(find_runs(folder), None) is None
        said = "There are no runs in {} yet. Train one: dist-train train -c mnist" if empty else "No such run in {}."
        click.echo(said.format(folder), err=True)
        return
    place = places(waiting_jobs(folder)) if any(run.state == "QUEUED" for run in found) else {}
    if as_json:
        for run in found:
            click.echo(json.dumps(_plain(run) | {"place": place.get(run.name)}))
        return
    jobs = unfinished_jobs(found)
    further = {
        f"{split} {name}": (split, name)
        for split in ("val", "test")
        for run in found
        for name in further_metrics(run.scores(split), split)
    }
    columns = ["run", "state", "progress", "last seen", "val accuracy", "test accuracy", *further, "samples/s", "ranks",
               "starts"]  # fmt: skip
    rows = [_cells(run, place.get(run.name), further.values()) for run in found]
    if jobs:
        columns.append("Slurm")
        rows = [[*row, jobs[run.job].state if run.job in jobs else "-"] for row, run in zip(rows, found, strict=True)]
    print_table(columns, rows)


@runs.command()
@_run
def show(run: Path) -> None:
    """Show everything about one run."""
    from dist_train.launch.run_details import run_details

    rows = run_details(run)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:{width}}  {value}")


@runs.command()
@_run
@click.option("-n", "count", default=10, show_default=True, type=click.IntRange(min=0), help="Number of past lines.")
def tail(run: Path, count: int) -> None:
    """Print the newest metrics of a run, and new ones until it ends."""
    from dist_train.runs.progress import describe
    from dist_train.runs.reports.compare import read_run
    from dist_train.runs.summary import summarise

    trained = read_run(run)
    past = sum(describe(line, None) is not None for line in trained.lines)
    for line in trained.summary.run_dir.metrics.follow(until=lambda: not summarise(run).may_be_running):
        text = describe(line, trained.summary.total_steps)
        if text is not None and past <= count:
            click.echo(text)
        past -= text is not None
    click.echo(f"{run}: {summarise(run).state}")


@runs.command()
@_run
def stop(run: Path) -> None:
    """Ask a run, or its queued job, to save and stop. Works from any machine that sees its directory."""
    from dist_train.launch.jobs import request_stop

    click.echo(request_stop(run))


@runs.command()
@click.argument("paths", nargs=-1, required=True, type=RunPath(), metavar="RUN...")
@click.option("--out", "files", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
              help="Write a .md, .csv, .json, .png or .html file.")  # fmt: skip
@click.option("--by", "axis", default="step", show_default=True, type=click.Choice(["step", "samples", "seconds"]),
              help="Axis of the curves in a .png.")  # fmt: skip
def compare(paths: tuple[Path, ...], files: tuple[Path, ...], axis: Any) -> None:
    """Compare metrics, with the best marked, and the settings that differ; seeds as mean and deviation."""
    from dist_train.runs.reports.compare import compare as tables_of
    from dist_train.runs.reports.compare import read_run
    from dist_train.runs.reports.files import write_comparison

    found = []
    for path in paths:
        try:
            found.append(read_run(path))
        except RunDirError as error:
            if len(paths) == 1:
                raise
            click.echo(f"left out: {error}", err=True)
    if not found:
        raise RunDirError("None of these is a run directory.")
    if files:
        for file in write_comparison(found, files, axis):
            click.echo(f"written: {file}")
    else:
        for number, table in enumerate(tables_of(found)):
            if number:
                click.echo(f"\n{table.title}")
            print_table(table.columns, table.texts(mark="{} *".format))


def _cells(run: Summary, place: int | None, further: Iterable[tuple[str, str]]) -> list[str]:
    from dist_train.runs.accuracy_text import accuracy_text

    values = [run.scores(split).get(f"{split}/{name}") for split, name in further]
    speed = f"{run.samples_per_s:,.0f}" if run.samples_per_s else "-"
    return [
        run.name,
        run.state if place is None else f"{run.state} {place}",
        run.progress_text,
        run.age_text,
        accuracy_text(run.best, "val") or "-",
        accuracy_text(run.result, "test") or "-",
        *("-" if value is None else f"{value:.4g}" for value in values),
        speed,
        str(run.world_size or "-"),
        str(run.attempt),
    ]


def _plain(run: Summary) -> dict[str, Any]:
    from dist_train.runs.further_metrics import further_metrics

    return {
        "run": str(run.run_dir.path), "state": run.state, "step": run.step, "total_steps": run.total_steps,
        "age_s": run.age_s, "val_accuracy": run.accuracy, "test_accuracy": run.test_accuracy,
        **{f"{split}_{name}": value for split in ("val", "test")
           for name, value in further_metrics(run.scores(split), split).items()},
        "samples_per_s": run.samples_per_s, "world_size": run.world_size, "attempt": run.attempt, "job": run.job,
    }  # fmt: skip
