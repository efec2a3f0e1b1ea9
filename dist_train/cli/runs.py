"""`runs ls|show|tail|stop|compare`: from the files of the runs alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dist_train.cli.options import RunPath, print_table
from dist_train.errors import ConfigError, DistTrainError, LaunchError, RunDirError

if TYPE_CHECKING:
    from dist_train.launch.slurm.commands import Job
    from dist_train.runs.summary import Summary

_QUEUED = ("PENDING", "CONFIGURING")  # of a job, for the first time or again
_SORTS = ("name", "age", "progress", "accuracy", "speed", "state")
_run = click.argument("run", type=RunPath())


@click.group()
def runs() -> None:
    """Look at runs, live or ended, and compare them."""


@runs.command("ls")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--in", "folder", type=click.Path(path_type=Path), metavar="FOLDER", help="Where they lie.")
@click.option("--state", "states", multiple=True, metavar="STATE", help="Only those: FINISHED, TRAINING, KILLED, ...")
@click.option("--sort", default="name", show_default=True, type=click.Choice(_SORTS), help="The greatest last.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON for each.")
def ls(names: tuple[str, ...], folder: Path | None, states: tuple[str, ...], sort: str, as_json: bool) -> None:
    """A line for each run. NAME may hold * and ?."""
    from dist_train.config.paths import runs_root
    from dist_train.runs.summary import find_runs

    folder = folder or runs_root()
    if not folder.is_dir():
        raise RunDirError(f"There is no folder {folder}. Name one with --in, or set DIST_TRAIN_RUNS_DIR.")
    names = tuple(Path(name).name for name in names)  # paths are taken too
    wanted = {state.upper() for state in states}
    found = [
        run
        for run in find_runs(folder)
        if (not names or any(fnmatch(run.name, name) for name in names)) and (not wanted or run.state in wanted)
    ]
    if not found:
        click.echo(f"No such run in {folder}.", err=True)
    found.sort(key=_order(sort))
    if as_json:
        for run in found:
            click.echo(json.dumps(_plain(run)))
        return
    jobs = _jobs_of(found)
    columns = ["run", "state", "progress", "heard of", "val accuracy", "test accuracy", "samples/s", "ranks", "starts"]
    rows = [_cells(run) for run in found]
    if jobs:
        columns.append("Slurm")
        rows = [[*row, jobs[run.job].state if run.job in jobs else "-"] for row, run in zip(rows, found, strict=True)]
    print_table(columns, rows)


@runs.command()
@_run
def show(run: Path) -> None:
    """All about one run."""
    from dist_train.checkpoints.manifest import manifests
    from dist_train.checkpoints.resume_hint import resume_hint
    from dist_train.runs.error_report import describe_error
    from dist_train.runs.reports.compare import read_run
    from dist_train.runs.time_accounting import effective_ratio

    trained = read_run(run)
    summary, run_dir = trained.summary, trained.summary.run_dir
    rows = [["run", str(run_dir.path)], ["state", f"{summary.state}, heard of {_age(summary)} ago"]]
    rows.append(["progress", f"{_progress(summary)}, start {summary.attempt}, world size {summary.world_size or '-'}"])
    facts = run_dir.read_provenance()
    if facts:
        device, threads, mode, precision = (
            facts.get(name, "?") for name in ("device", "num_threads", "step_mode", "mixed_precision")
        )
        rows.append(["computed by", f"{device}, {threads} threads a rank, {mode} step, mixed precision {precision}"])
    newest: dict[str, Any] = {}
    for line in trained.lines:
        newest |= {key: value for key, value in line.items() if "/" in key and not key.startswith(("perf/", "audit/"))}
    newest |= {key: value for key, value in summary.result.items() if "/" in key}
    rows += [[key, f"{value:g}"] for key, value in sorted(newest.items()) if isinstance(value, (int, float))]
    if summary.samples_per_s:
        rows.append(["samples/s", f"{summary.samples_per_s:,.0f}"])
    if seconds := summary.seconds:
        spent = ", ".join(f"{use} {value:.1f}" for use, value in seconds.items() if value)
        rows.append(["seconds", f"{spent}; {effective_ratio(seconds):.1%} of them new steps"])
    rows.append(["checkpoints", ", ".join(path.name for path in manifests(run_dir)) or "none"])
    job = _jobs_of([summary]).get(summary.job or "")
    if summary.job:
        rows.append(["Slurm", f"job {summary.job}" + (f", {job.state} {job.reason}" if job else "")])
    if error := run_dir.read_error():
        rows.append(["error", describe_error(error)])
    waits = job is not None and job.state in (*_QUEUED, "RUNNING")
    if not summary.is_live and summary.state not in ("FINISHED", "NEW") and not waits:
        alone = not summary.job and facts.get("num_nodes") == 1
        rows.append(["to go on", resume_hint(run_dir, summary.world_size if alone else None)])
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:{width}}  {value}")


@runs.command()
@_run
@click.option("-n", "count", default=10, show_default=True, type=click.IntRange(min=0), help="So many of the past.")
def tail(run: Path, count: int) -> None:
    """The newest metrics of a run, and those to come, until it ends."""
    from dist_train.runs.progress import describe
    from dist_train.runs.reports.compare import read_run
    from dist_train.runs.summary import summarise

    trained = read_run(run)
    past = sum(describe(line, None) is not None for line in trained.lines)
    for line in trained.summary.run_dir.metrics.follow(until=lambda: not summarise(run).goes_on):
        text = describe(line, trained.summary.total_steps)
        if text is not None and past <= count:
            click.echo(text)
        past -= text is not None
    click.echo(f"{run}: {summarise(run).state}")


@runs.command()
@_run
def stop(run: Path) -> None:
    """Ask a run to save and stop, also one that waits in Slurm's queue. Any machine that sees its directory may."""
    from dist_train.runs.reports.compare import read_run

    summary = read_run(run).summary
    job = None if summary.goes_on else _jobs_of([summary]).get(summary.job or "")
    queued = job is not None and (job.state in _QUEUED or (job.state, summary.state) == ("RUNNING", "NEW"))
    if not summary.goes_on and not queued:
        raise RunDirError(f"{run} is not running: {summary.state}.")
    try:
        summary.run_dir.stop_request_file.touch()
    except OSError as error:
        raise RunDirError(f"{summary.run_dir.stop_request_file} cannot be written: {error.strerror}.") from None
    if queued:
        begins = f"Job {summary.job} of {run} is yet to begin: it stops after its first step, and saves first."
        click.echo(f"{begins} dist-train slurm cancel {run} takes it out of the queue instead.")
    else:
        click.echo(f"{run} stops after its present step, and saves first: dist-train runs tail {run} shows it.")


@runs.command()
@click.argument("paths", nargs=-1, required=True, type=RunPath(), metavar="RUN...")
@click.option("--out", "files", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
              help="Write it to a .md, .csv, .json, .png or .html file.")  # fmt: skip
@click.option("--by", "axis", default="step", show_default=True, type=click.Choice(["step", "samples", "seconds"]),
              help="Of the curves in a .png.")  # fmt: skip
def compare(paths: tuple[Path, ...], files: tuple[Path, ...], axis: Any) -> None:
    """Metrics side by side, the best marked, and the settings that differ; seeds as mean and spread."""
    from dist_train.runs.reports.charts import learning_curves
    from dist_train.runs.reports.compare import compare as tables_of
    from dist_train.runs.reports.compare import read_run, to_csv, to_json, to_markdown
    from dist_train.runs.reports.html import to_html

    found = []
    for path in paths:
        try:
            found.append(read_run(path))
        except RunDirError as error:
            if len(paths) == 1:
                raise
            click.echo(f"left out: {error}", err=True)
    if not found:
        raise RunDirError("None of these is a run.")
    tables = tables_of(found)
    writers: dict[str, Callable[[], str | bytes]] = {
        ".md": lambda: to_markdown(tables),
        ".csv": lambda: to_csv(tables[0]),
        ".json": lambda: to_json(tables),
        ".png": lambda: learning_curves(found, axis),
        ".html": lambda: to_html(found, tables),
    }
    for file in files:
        if file.suffix not in writers:
            raise ConfigError(f"--out={file}: a comparison can be written as {', '.join(writers)}.")
    failed: DistTrainError | None = None
    for file in files:
        try:
            content = writers[file.suffix]()
        except DistTrainError as error:  # the other files need no matplotlib
            failed = type(error)(f"{file} was not written. {error}")
            continue
        try:
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
        except OSError as error:
            raise RunDirError(f"{file} cannot be written: {error.strerror}.") from None
        click.echo(f"written: {file}")
    if failed is not None:
        raise failed
    if not files:
        for number, table in enumerate(tables):
            if number:
                click.echo(f"\n{table.title}")
            print_table(table.columns, table.texts(mark="{} *".format))


def _order(sort: str) -> Callable[[Summary], Any]:
    low = float("-inf")
    keys: dict[str, Callable[[Summary], Any]] = {
        "name": lambda run: run.name,
        "age": lambda run: run.heartbeat or low,  # the newest last
        "progress": lambda run: run.progress or 0.0,
        "accuracy": lambda run: low if run.accuracy is None else run.accuracy,
        "speed": lambda run: run.samples_per_s or low,
        "state": lambda run: run.state,
    }
    return keys[sort]


def _cells(run: Summary) -> list[str]:
    accuracies = ["-" if value is None else f"{value:.2%}" for value in (run.accuracy, run.test_accuracy)]
    speed = f"{run.samples_per_s:,.0f}" if run.samples_per_s else "-"
    return [
        run.name,
        run.state,
        _progress(run),
        _age(run),
        *accuracies,
        speed,
        str(run.world_size or "-"),
        str(run.attempt),
    ]


def _progress(run: Summary) -> str:
    return f"{run.step}/{run.total_steps} {run.progress:.0%}" if run.progress is not None else "-"


def _age(run: Summary) -> str:
    """ "3 s", "5 min", "2 h", "4 d"."""
    if run.age_s is None:
        return "-"
    for unit, seconds in (("d", 86_400), ("h", 3600), ("min", 60)):
        if run.age_s >= 2 * seconds:
            return f"{run.age_s // seconds:.0f} {unit}"
    return f"{run.age_s:.0f} s"


def _plain(run: Summary) -> dict[str, Any]:
    return {
        "run": str(run.run_dir.path), "state": run.state, "step": run.step, "total_steps": run.total_steps,
        "age_s": run.age_s, "val_accuracy": run.accuracy, "test_accuracy": run.test_accuracy,
        "samples_per_s": run.samples_per_s, "world_size": run.world_size, "attempt": run.attempt, "job": run.job,
    }  # fmt: skip


def _jobs_of(found: Sequence[Summary]) -> dict[str, Job]:
    """What Slurm says of the jobs among them that have not ended; nothing where there is no Slurm."""
    from dist_train.launch.slurm import commands as cluster

    ids = {run.job for run in found if run.job and run.state != "FINISHED"}
    try:
        return cluster.jobs(sorted(ids)) if ids else {}
    except LaunchError:
        return {}
