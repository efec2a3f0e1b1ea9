"""`slurm render|submit|status|logs|cancel|requeue-check`."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dist_train.cli.options import RunPath, arguments_of_train, look_up, print_table, resolve, start_options
from dist_train.errors import RunDirError

if TYPE_CHECKING:
    from dist_train.config.schema import Config
    from dist_train.launch.slurm.batch_script import BatchScript
    from dist_train.runs.directory import RunDir
    from dist_train.runs.start_options import StartOptions


@click.group()
def slurm() -> None:
    """Hand a run to Slurm, and look after it."""


def _job_options(command: Any) -> Any:
    """What a job asks Slurm for."""
    at_least_one = click.IntRange(min=1)
    for option in (
        click.option("--setup", multiple=True, metavar="LINE", help='Shell lines first, e.g. "module load cuda".'),
        click.option("--sbatch", "options", multiple=True, metavar="OPTION", help="Any other: --sbatch=--qos=long."),
        click.option("--max-requeues", default=100, show_default=True, type=click.IntRange(min=0)),
        click.option("--lead-s", default=120, show_default=True, type=at_least_one, help="Time to save at the limit."),
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


_OF_JOB = (
    "launcher", "nodes", "nproc", "cpus_per_proc", "gpus_per_node", "time", "partition", "log", "lead_s",
    "max_requeues", "options", "setup",
)  # fmt: skip


def _script(options: dict[str, Any], config: Config, start: StartOptions) -> BatchScript:
    from dist_train.launch.slurm.batch_script import BatchScript

    arguments = arguments_of_train(options)[1:]
    if options["run_name"]:
        arguments += (f"--run-name={options['run_name']}",)
    asked = {name: options[name] for name in _OF_JOB}
    return BatchScript(
        arguments=arguments,
        job_name=start.config_name,
        join_timeout_s=config.setup_timeout_s,
        python=sys.executable,
        **asked,
    )


@slurm.command()
@_job_options
def render(**options: Any) -> None:
    """Print the sbatch script that submit would hand in."""
    click.echo(_script(options, *resolve(options)).render(), nl=False)


@slurm.command()
@_job_options
def submit(**options: Any) -> None:
    """Queue a run; prints the job's id and the run's directory. What cannot work is refused first."""
    from dataclasses import replace

    from dist_train.atomic_files import write_json
    from dist_train.distributed.process import persistent_run_name
    from dist_train.launch.slurm import commands as cluster
    from dist_train.launch.slurm.preflight import check_partition, check_submission
    from dist_train.runs.start_options import check_start, find_run_dir, valid_run_name

    config, start = resolve(options)
    script = _script(options, config, start)
    named = find_run_dir(config, start) if start.run_name or start.run_dir else None
    if named is not None and check_start(named, config, start, create=False):
        click.echo(f"{named.path} is finished already: nothing to do.")
        return
    look_up(config)
    check_submission(script, config, named.read_status().get("save_s", 0.0) if named is not None else 0.0)
    check_partition(script, cluster.partitions())
    if options["dry_run"]:
        click.echo(script.render(), nl=False)
        return
    job = cluster.submit(script.render())
    if named is None:
        as_the_job_finds_it = persistent_run_name(valid_run_name(start.config_name), {"SLURM_JOB_ID": job})
        named = find_run_dir(config, replace(start, run_name=as_the_job_finds_it))
    named.create()
    (named.path / "job.sbatch").write_text(script.render())
    log = Path(script.log.replace("%x", script.job_name).replace("%j", job)).absolute()
    write_json(named.slurm_json, {"job": job, "log": str(log), "submitted": round(time.time(), 3)})
    click.echo(f"job {job}, run directory {named.path}")


@slurm.command()
@click.argument("runs", nargs=-1, type=RunPath(), metavar="[RUN]...")
def status(runs: tuple[Path, ...]) -> None:
    """What Slurm and the runs themselves say of them; without RUN: of all that were submitted."""
    from dist_train.config.paths import runs_root
    from dist_train.launch.slurm import commands as cluster
    from dist_train.runs.directory import RunDir

    paths = [*runs] or sorted(path.parent for path in runs_root().glob("*/slurm.json"))
    found = {run: _job_of(RunDir(run)) for run in paths}
    states = cluster.jobs(found.values())
    rows = []
    for run, job in found.items():
        own = RunDir(run).read_status()
        steps = f"{own['step']}/{own.get('total_steps', '?')}" if "step" in own else "-"
        rows.append(
            (run.name, job, states[job].state, states[job].reason or "-", own.get("state", "-"), steps,
             str(own.get("attempt", 0)))
        )  # fmt: skip
    print_table(("run", "job", "Slurm", "nodes or reason", "run's state", "step", "starts"), rows)


def _job_of(run_dir: RunDir) -> str:
    """The id of the job that the run belongs to."""
    from dist_train.runs.summary import summarise

    job = summarise(run_dir.path).job
    if job is None:
        raise RunDirError(f"{run_dir.path} was not submitted to Slurm: neither slurm.json nor status.json names a job.")
    return job


@slurm.command()
@click.argument("run", type=RunPath())
@click.option("-n", "count", default=40, show_default=True, type=click.IntRange(min=1), help="So many lines.")
def logs(run: Path, count: int) -> None:
    """The last lines of a job's log."""
    from dist_train.runs.directory import RunDir

    log = Path(RunDir(run).read_submission().get("log", ""))
    if not log.is_file():
        raise RunDirError(f"{run} has no log of a job yet ({log}): it waits, or it was not submitted from here.")
    with log.open(errors="replace") as file:
        click.echo("".join(deque(file, count)), nl=False)


@slurm.command()
@click.argument("run", type=RunPath())
def cancel(run: Path) -> None:
    """End a run's job. It saves first if it is running."""
    from dist_train.launch.slurm import commands as cluster
    from dist_train.runs.directory import RunDir

    cluster.cancel(_job_of(RunDir(run)))


@slurm.command("requeue-check")
@start_options
@click.option("--max-requeues", default=100, show_default=True, type=click.IntRange(min=0))
@click.option("--told", is_flag=True, help="The batch shell was told that its time is up.")
def requeue_check(max_requeues: int, told: bool, **options: Any) -> None:
    """For batch scripts, after the step has ended: prints requeue, ended or failed, and on stderr why."""
    from dist_train.checkpoints.resume_hint import resume_hint
    from dist_train.launch.slurm.preemption import decide_requeue
    from dist_train.runs.start_options import find_run_dir

    run_dir = find_run_dir(*resolve(options))
    decision, why = decide_requeue(run_dir, os.environ, max_requeues, told=told)
    click.echo(decision)
    if decision == "failed" and run_dir.config.exists():
        click.echo(resume_hint(run_dir), err=True)
    click.echo(f"{run_dir.path}: {decision}, {why}", err=True)  # last: the log's last line says why
