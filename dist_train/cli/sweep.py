"""`sweep`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dist_train.cli.options import load, print_table, settings_options

if TYPE_CHECKING:
    from dist_train.runs.summary import Summary


@click.command()
@settings_options
@click.option("--name", metavar="N", help="Prefix of the names of its runs.  [default: CONFIG-sweep]")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(min=1), help="Number of runs at a time.")
@click.option("--nproc", type=click.IntRange(min=1), metavar="N", help="Processes of each run.")
@click.option("--lines", is_flag=True, help="Only print the settings of each run, for slurm/sweep_array.sbatch.")
def sweep(
    config_name: str | None, overrides: tuple[str, ...], settings: tuple[str, ...], name: str | None, jobs: int,
    nproc: int | None, lines: bool,
) -> None:  # fmt: skip
    """Train a run for each combination of listed values: -o 'optimizer.lr=[1e-3,3e-3]' -o 'seed=[0,1,2]'.

    The same command again continues the missing runs. At the end the runs are compared.
    """
    from dist_train.config.loading import missing_config
    from dist_train.config.paths import runs_root
    from dist_train.launch.sweep import Grid, Sweep
    from dist_train.runs.reports.compare import compare, read_run
    from dist_train.runs.start_options import valid_run_name

    if config_name is None:
        raise missing_config((*overrides, *settings))
    load(config_name)
    name = name or valid_run_name(f"{Path(config_name).stem}-sweep")
    grid = Grid.of(name, config_name, [*overrides, *settings])
    if lines:
        click.echo("\n".join(grid.lines()))
        return
    work = Sweep(grid, runs_root(grid.points[0].config.runs_dir), jobs=jobs, nproc=nproc)
    done = work.train(_show)
    finished = [run for run in done if run.state == "FINISHED"]
    if finished:
        click.echo()
        for table in compare([read_run(run.run_dir.path) for run in finished]):
            print_table(table.columns, table.texts(mark="{} *".format))
            click.echo()
        if any(run.result.get("val_source") == "the test split" for run in finished):
            click.echo(
                "Choosing among them is choosing by the test split; data.val_examples=5000 holds out others for that."
            )
    click.echo(f"{len(finished)} of {len(done)} runs are finished.")
    if len(finished) < len(done):
        click.echo("The same command continues the others.")
        sys.exit(0 if work.stopped else 1)


def _show(run: Summary, ended: bool) -> None:
    from dist_train.runs.accuracy_text import accuracy_text
    from dist_train.runs.further_metrics import further_text

    if not ended:
        click.echo(f"{run.name}: begins" if not run.attempt else f"{run.name}: goes on")
    elif run.state == "FINISHED":
        numbers = [accuracy_text(run.result, "test"), *further_text(run.result, "test")]
        found = ", ".join(filter(None, numbers))
        click.echo(f"{run.name}: finished" + (f", {found} on test" if found else ""))
    else:
        click.echo(f"{run.name}: {_why(run)}")


def _why(run: Summary) -> str:
    from dist_train.runs.error_report import describe_error

    error = run.run_dir.read_error()
    said = describe_error(error) if error else f"see {run.run_dir.logs / 'sweep.log'}"
    return f"{run.state}, {said}"
