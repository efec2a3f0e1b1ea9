"""A run as a job: started in this process, on this machine or in Slurm's queue, and asked to stop."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_train.atomic_files import write_json
from dist_train.config.schema import Config
from dist_train.distributed.process_info import persistent_run_name
from dist_train.distributed.signals import StopRequest
from dist_train.errors import DistTrainError, LaunchError, RunDirError
from dist_train.launch.job_queue import take_back
from dist_train.launch.machines import Nodes, stop_run_to_rejoin
from dist_train.launch.slurm import commands
from dist_train.launch.slurm.batch_script import BatchScript
from dist_train.launch.slurm.commands import Job
from dist_train.launch.slurm.preemption import SlurmScheduler
from dist_train.launch.slurm.preflight import check_partition, check_submission
from dist_train.launch.torchrun import LaunchSpec, start_ranks
from dist_train.runs import deleted_runs
from dist_train.runs.directory import RunDir
from dist_train.runs.start_options import (
    StartOptions,
    check_initial_weights,
    check_start,
    find_run_dir,
    remove_if_not_started,
    valid_run_name,
)
from dist_train.runs.summary import Summary, summarise, summarise_existing
from dist_train.runs.train_arguments import TrainArguments

_QUEUED = ("PENDING", "CONFIGURING")  # states of a job, for the first time or requeued
_NOT_STARTED = ("NEW", "PREEMPTED")  # states of a run, until the job that is to start or to continue it does so


def train_here(config: Config, start: StartOptions, request: StopRequest, started: float) -> None:
    """Train in this process, which may be one rank of several.

    `started`: time.perf_counter() when the process began.

    Collective: every rank must call this.
    """
    from dist_train.training.run import run_training

    request.preempt_signal = signal.Signals[f"SIG{config.preempt_signal}"]
    with request:
        run_training(config, start, request, started, SlurmScheduler(os.environ))


def check_optimizer(config: Config) -> None:
    """Check an optimizer that takes its own step: see `find_optimizer`."""
    if config.optimizer.own_step:
        from dist_train.training.step.optimizer_names import find_optimizer

        find_optimizer(config.optimizer)


def check(run_dir: RunDir, config: Config, start: StartOptions, *, create: bool = False) -> bool:
    """Do as `check_start`, and check an extension too. One with a schedule of the user's is checked in training only.

    Raises:
        ConfigError, RunDirError: The run cannot be started there.
    """
    from dist_train.training.extension import check_extension

    finished = check_start(run_dir, config, start, create=create)
    status = run_dir.status.read()
    if start.extend and status.get("step") and status.get("epoch") and ":" not in config.schedule.name:
        check_extension(run_dir, config, steps_per_epoch=round(status["step"] / status["epoch"]))
    return finished


def launch(
    config: Config,
    start: StartOptions,
    arguments: tuple[str, ...],
    nproc: int,
    *,
    nodes: Nodes | None = None,
    max_restarts: int = 0,
    dry_run: bool = False,
    say: Callable[[str], object] = print,
) -> int:
    """Start `nproc` ranks on this machine and wait for them; returns the exit code to leave with.

    Everything that can be refused is refused before any process starts. `arguments`: of `python -m dist_train`, for
    each rank; `nodes`: the machines that train together, None for this one alone; `say` gets the torchrun command.

    Raises:
        ConfigError, RunDirError: The run cannot be started there.
        LaunchError: A rank failed; with the error of the one that failed first.
    """
    check_optimizer(config)
    run_dir = find_run_dir(config, start, claim=not dry_run)
    finished = check(run_dir, config, start, create=not dry_run)
    spec = LaunchSpec(
        arguments=arguments,
        run_dir=run_dir,
        asked_at=start.asked_at,
        nproc=nproc,
        nodes=nodes,
        max_restarts=max_restarts,
    )
    if nodes is not None and nodes.at_least < nodes.at_most and not dry_run:
        stop_run_to_rejoin(run_dir)
    say(str(spec))
    if dry_run:
        return 0
    if finished:
        say(f"{run_dir.path} is finished already: nothing to do.")
        return 0
    if nodes is None:
        run_dir.lock()  # refuses a directory that is in use before any process starts
        run_dir.unlock()
    try:
        return start_ranks(spec)
    except DistTrainError:
        remove_if_not_started(run_dir, start)
        raise


def find_finished(config: Config, start: StartOptions) -> RunDir | None:
    """Return the directory of the run that is named, if it is finished already.

    Raises:
        ConfigError, RunDirError: It cannot be started there.
    """
    run_dir = _named(config, start)
    return run_dir if run_dir is not None and check(run_dir, config, start) else None


def _named(config: Config, start: StartOptions) -> RunDir | None:
    return find_run_dir(config, start) if start.run_name or start.run_dir else None


def batch_script(arguments: TrainArguments, config: Config, start: StartOptions, **requested: Any) -> BatchScript:
    """Return the script of a job that trains a run. `requested`: fields of BatchScript, such as nodes and time.

    Raises:
        ConfigError: one of them contains a control character.
    """
    run_name = (f"--run-name={start.run_name}",) if start.run_name else ()
    return BatchScript(
        arguments=arguments.of_a_rank()[1:] + run_name,
        job_name=start.config_name,
        join_timeout_s=config.setup_timeout_s,
        python=sys.executable,
        **requested,
    )


def check_job(script: BatchScript, config: Config, start: StartOptions) -> RunDir | None:
    """See that Slurm can run the job. Returns the run's directory if it is known before the job has an id.

    Raises:
        ConfigError, DataError, LaunchError, RunDirError: It cannot.
    """
    run_dir = _named(config, start)
    if run_dir is None:
        check_initial_weights(config)
    check_submission(script, config, run_dir.status.read().get("save_s", 0.0) if run_dir is not None else 0.0)
    check_partition(script, commands.partitions())
    return run_dir


def submit(script: BatchScript, config: Config, start: StartOptions, run_dir: RunDir | None) -> tuple[str, RunDir]:
    """Queue a job and record it in the run's directory; returns the job's id and that directory.

    `run_dir`: as `check_job` returned it.

    Raises:
        LaunchError: Slurm refuses the job.
        RunDirError: The directory cannot be written.
    """
    text = script.render()
    job = commands.submit(text)
    if run_dir is None:
        name = persistent_run_name(valid_run_name(start.config_name), {"SLURM_JOB_ID": job})  # as the job computes it
        run_dir = find_run_dir(config, replace(start, run_name=name))
    run_dir.create()
    (run_dir.path / "job.sbatch").write_text(text)
    log = Path(script.log.replace("%x", script.job_name).replace("%j", job)).absolute()
    submission = {
        "job": job, "log": str(log), "cwd": str(Path.cwd()), "options": script.submit_options(),
        "submitted": round(time.time(), 3),
    }  # fmt: skip
    write_json(run_dir.slurm_json, submission)
    return job, run_dir


def job_of(run_dir: RunDir) -> str:
    """Return the id of the newest job of a run.

    Raises:
        RunDirError: It was not submitted.
    """
    job = summarise(run_dir.path).job
    if job is None:
        raise RunDirError(f"{run_dir.path} was not submitted to Slurm: neither slurm.json nor status.json names a job.")
    return job


def unfinished_jobs(runs: Iterable[Summary]) -> dict[str, Job]:
    """Return what Slurm says of the jobs of unfinished runs, by id; {} where there is no Slurm."""
    ids = {run.job for run in runs if run.job and run.state != "FINISHED"}
    try:
        return commands.jobs(sorted(ids)) if ids else {}
    except LaunchError:
        return {}


def is_waiting(job: Job | None) -> bool:
    """Whether a job is in the queue."""
    return job is not None and job.state in _QUEUED


def is_active(job: Job | None) -> bool:
    """Whether a job is in the queue or at work."""
    return is_waiting(job) or (job is not None and job.state == "RUNNING")


def request_stop(path: Path) -> str:
    """Ask a run, or the queued job of one, to save and stop; returns what will happen.

    Raises:
        RunDirError: It is not running and not queued, or its directory cannot be written.
    """
    summary = summarise_existing(path)
    if summary.state == "QUEUED":
        raise RunDirError(f"{path} waits in the queue: dist-train queue rm {path} takes it out.")
    job = None if summary.may_be_running else unfinished_jobs([summary]).get(summary.job or "")
    starting = job is not None and job.state == "RUNNING" and summary.state in _NOT_STARTED
    queued = is_waiting(job) or starting
    if not summary.may_be_running and not queued:
        raise RunDirError(f"{path} is not running: {summary.state}.")
    try:
        summary.run_dir.stop_request_file.touch()
    except OSError as error:
        raise RunDirError(f"{summary.run_dir.stop_request_file} cannot be written: {error.strerror}.") from None
    if queued:
        return (
            f"Job {summary.job} of {path} has not begun: it stops after its first step, and saves first. "
            f"dist-train slurm cancel {path} takes it out of the queue instead."
        )
    if summary.state == "STARTING":
        return f"{path} is starting: it stops after its first step, and saves first."
    return f"{path} stops after its current step, and saves first: dist-train runs tail {path} shows it."


def delete_run(path: Path) -> None:
    """Move a run to the bin.

    Raises:
        RunDirError: it may be running or starting, its job is in the queue, or the folder cannot be written.
    """
    summary = summarise_existing(path)
    job = unfinished_jobs([summary]).get(summary.job or "")
    if is_waiting(job):
        raise RunDirError(f"{summary.name} waits in the queue. Cancel its job first: dist-train slurm cancel {path}")
    if summary.state == "QUEUED":  # restored, it must not be begun by surprise
        take_back(path)
    deleted_runs.delete(path)


def request_save(path: Path) -> None:
    """Ask a run to save after its current step.

    Raises:
        RunDirError: it is not running, or its directory cannot be written.
    """
    summary = summarise_existing(path)
    if not summary.may_be_running:
        raise RunDirError(f"{path} is not running: {summary.state}.")
    try:
        summary.run_dir.save_request_file.touch()
    except OSError as error:
        raise RunDirError(f"{summary.run_dir.save_request_file} cannot be written: {error.strerror}.") from None
