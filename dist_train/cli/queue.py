"""`queue ls|add|rm`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dist_train.cli.options import RunPath, check_net_and_data, load, print_table, settings_options
from dist_train.errors import ConfigError

if TYPE_CHECKING:
    from dist_train.config.schema import Config


@click.group()
def queue() -> None:
    """Train runs one after another on this machine, in processes that outlive the shell."""


@queue.command("ls")
@click.option("--in", "folder", type=click.Path(path_type=Path), metavar="FOLDER", help="The folder of runs.")
def queue_ls(folder: Path | None) -> None:
    """List the jobs that are at work and those that wait."""
    from dist_train.config.paths import runs_root
    from dist_train.launch.job_queue import ensure_keeper, is_of_this_host, places, waiting_jobs
    from dist_train.launch.keeper import jobs_at_work
    from dist_train.runs.summary import summarise

    folder = folder or runs_root()
    waiting = waiting_jobs(folder)
    jobs = [*(summarise(run_dir.path) for run_dir in jobs_at_work(folder)), *waiting]
    if not jobs:
        click.echo(f"No job is at work or waits in {folder}. Queue one: dist-train queue add -c mnist --run-name first")
        return
    place = places(waiting)
    columns = ("place", "run", "state", "progress", "ranks", "host")
    print_table(columns, [
        (str(place.get(job.name, "-")), job.name, job.state, job.progress_text,
         str(job.world_size or "-"), job.queue_host or "-")
        for job in jobs
    ])  # fmt: skip
    if any(map(is_of_this_host, waiting)):
        ensure_keeper(folder)  # the last one may have been killed


@queue.command("add")
@settings_options
@click.option("--run-name", metavar="N", help="Name of the new run's directory.")
@click.option("--nproc", type=click.IntRange(min=1), metavar="N", help="Processes of the new run.  [default: 1]")
@click.option("--jobs", type=click.IntRange(min=1), metavar="N",
              help="Jobs at a time on this machine, from now on; on GPUs as many as fit.  [default: 1]")  # fmt: skip
def queue_add(
    config_name: str | None, overrides: tuple[str, ...], settings: tuple[str, ...], run_name: str | None,
    nproc: int | None, jobs: int | None,
) -> None:  # fmt: skip
    """Queue a new run, with -c FILE --run-name N [KEY=VALUE]..., or created ones: RUN...

    A new run will train in this folder, with this interpreter and the variables that run.json records.
    """
    from dist_train.config.paths import runs_root
    from dist_train.launch.job_queue import enqueue, ensure_keeper

    if config_name is not None:
        paths = [_create(load(config_name, (*overrides, *settings)), run_name, nproc or 1)]
    elif run_name or nproc or overrides:
        raise ConfigError("--run-name, --nproc and -o are those of a new run: name its config with -c FILE.")
    elif not settings:
        raise ConfigError("There is nothing to queue. Name created runs, or a config: -c FILE --run-name N.")
    else:
        paths = [RunPath().convert(name, None, None) for name in settings]
    for path in paths:
        enqueue(path)
        ensure_keeper(path.parent, jobs)
        elsewhere = f" --in {path.parent}" if path.parent.absolute() != runs_root().absolute() else ""
        click.echo(f"{path} waits in the queue: dist-train queue ls{elsewhere} shows it.")


def _create(config: Config, run_name: str | None, nproc: int) -> Path:
    from dist_train.config.paths import runs_root
    from dist_train.launch.job_queue import create_job
    from dist_train.runs.directory import RunDir

    if run_name is None:
        raise ConfigError("A job needs a name for its run directory: --run-name=N.")
    check_net_and_data(config)
    run_dir = RunDir(runs_root(config.runs_dir) / run_name)
    create_job(run_dir, config, nproc)
    return run_dir.path


@queue.command("rm")
@click.argument("runs", nargs=-1, required=True, type=RunPath(), metavar="RUN...")
def queue_rm(runs: tuple[Path, ...]) -> None:
    """Take jobs that wait out of the queue. They stay, CREATED, and can be queued again."""
    from dist_train.launch.job_queue import take_back

    for run in runs:
        take_back(run)


@queue.command("work", hidden=True)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("lock", type=int)
def queue_work(folder: Path, lock: int) -> None:
    """Begin the jobs that wait. LOCK: the descriptor of the keeper's lock."""
    import time

    from dist_train.launch.keeper import keep

    keep(folder, lock, lambda text: click.echo(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}"))
