"""`slurm render|submit|status|logs|cancel|requeue-check`."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dist_train.cli.options import STARTED, RunPath, check_net_and_data, print_table, start_options, train_arguments
from dist_train.errors import RunDirError

if TYPE_CHECKING:
    from dist_train.config.schema import Config
    from dist_train.launch.slurm.batch_script import BatchScript
    from dist_train.runs.start_options import StartOptions


@click.group()
def slurm() -> None:
    """Submit runs to Slurm and manage their jobs."""


def _job_options(command: Any) -> Any:
    """Add the options of a job."""
    at_least_one = click.IntRange(min=1)
    for option in (
        click.option("--setup", multiple=True, metavar="LINE", help='First shell line, e.g. "module load cuda".'),
        click.option("--sbatch", "options", multiple=True, metavar="OPTION", help="Another: --sbatch=--qos=long."),
        click.option("--max-requeues", default=100, show_default=True, type=click.IntRange(min=0)),
        click.option("--lead-s", default=120, show_default=True, type=at_least_one, help="Seconds left to save."),
        click.option("--log", default="%x-%j.out", show_default=True, metavar="FILE"),
        click.option("--partition", envvar="SBATCH_PARTITION", metavar="NAME"),
        click.option("--time", default="60", show_default=True, metavar="LIMIT", help="Minutes, HH:MM:SS or D-HH."),
        click.option("--gpus-per-node", default=0, show_default=True, type=click.IntRange(min=0)),
        click.option("--cpus-per-proc", default=1, show_default=True, type=at_least_one),
        click.option("--nproc", default=2, show_default=True, type=at_least_one, help="Processes on each node."),
        click.option("--nodes", default=1, show_default=True, type=at_least_one),
        click.option(
            "--launcher", default="torchrun", show_default=True, type=click.Choice(["torchrun", "srun", "accelerate"])
        ),
    ):  # fmt: skip
        command = option(command)
    return start_options(command)


def _resolve(options: dict[str, Any]) -> tuple[BatchScript, Config, StartOptions]:
    from dist_train.launch.jobs import batch_script
    from dist_train.launch.slurm.batch_script import OPTIONS

    arguments = train_arguments(options)
    config, start = arguments.resolve(STARTED)
    return batch_script(arguments, config, start, **{name: options[name] for name in OPTIONS}), config, start


@slurm.command()
@_job_options
def render(**options: Any) -> None:
    """Print the sbatch script that submit would queue."""
    script, _, _ = _resolve(options)
    click.echo(script.render(), nl=False)


@slurm.command()
@_job_options
def submit(**options: Any) -> None:
    """Queue a run, after checks; prints the job's id and the run directory."""
    from dist_train.launch import jobs

    script, config, start = _resolve(options)
    finished = jobs.find_finished(config, start)
    if finished is not None:
        click.echo(f"{finished.path} is finished already: nothing to do.")
        return
    check_net_and_data(config)
    known = jobs.check_job(script, config, start)
    if options["dry_run"]:
        click.echo(script.render(), nl=False)
        return
    job, run_dir = jobs.submit(script, config, start, known)
    click.echo(f"job {job}, run directory {run_dir.path}")


@slurm.command()
@click.argument("runs", nargs=-1, type=RunPath(), metavar="[RUN]...")
def status(runs: tuple[Path, ...]) -> None:
    """Show the state of jobs and of their runs; without RUN, of all submitted ones."""
    from dist_train.config.paths import runs_root
    from dist_train.launch.jobs import job_of
    from dist_train.launch.slurm import commands
    from dist_train.runs.directory import RunDir

    paths = [*runs] or sorted(path.parent for path in runs_root().glob("*/slurm.json"))
    found = {run: job_of(RunDir(run)) for run in paths}
    states = commands.jobs(found.values())
    rows = []
    for run, job in found.items():
        own = RunDir(run).status.read()
        steps = f"{own['step']}/{own.get('total_steps', '?')}" if "step" in own else "-"
        rows.append(
            (run.name, job, states[job].state, states[job].reason or "-", own.get("state", "-"), steps,
             str(own.get("attempt", 0)))
        )  # fmt: skip
    print_table(("run", "job", "Slurm", "nodes or reason", "run's state", "step", "starts"), rows)


@slurm.command()
@click.argument("run", type=RunPath())
@click.option("-n", "count", default=40, show_default=True, type=click.IntRange(min=1), help="Number of lines.")
def logs(run: Path, count: int) -> None:
    """Print the last lines of a job's log."""
    from dist_train.runs.directory import RunDir

    log = Path(RunDir(run).read_submission().get("log", ""))
    if not log.is_file():
        raise RunDirError(f"{run} has no log of a job yet ({log}): it is queued, or was not submitted from here.")
    with log.open(errors="replace") as file:
        click.echo("".join(deque(file, count)), nl=False)


@slurm.command()
@click.argument("run", type=RunPath())
def cancel(run: Path) -> None:
    """Cancel the job of a run, which saves first if it is running."""
    from dist_train.launch.jobs import job_of
    from dist_train.launch.slurm import commands
    from dist_train.runs.directory import RunDir

    commands.cancel(job_of(RunDir(run)))


@slurm.command("requeue-check")
@start_options
@click.option("--max-requeues", default=100, show_default=True, type=click.IntRange(min=0))
@click.option("--told", "stop_requested", is_flag=True, help="The batch shell was asked to stop.")
def requeue_check(max_requeues: int, stop_requested: bool, **options: Any) -> None:
    """For batch scripts, after the step has ended: prints requeue, ended or failed, and on stderr why."""
    from dist_train.checkpoints.resume_hint import resume_hint
    from dist_train.launch.slurm.preemption import decide_requeue
    from dist_train.runs.start_options import find_run_dir

    run_dir = find_run_dir(*train_arguments(options).resolve(STARTED))
    decision, why = decide_requeue(run_dir, os.environ, max_requeues, stop_requested=stop_requested)
    click.echo(decision)
    if decision == "failed" and run_dir.config.exists() and (hint := resume_hint(run_dir)):
        click.echo(hint, err=True)
    click.echo(f"{run_dir.path}: {decision}, {why}", err=True)  # last: the log's last line says why
