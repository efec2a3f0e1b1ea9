"""Resume a run as it was started, in processes that outlive this one; the commands for a shell that do so, or anew."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_train.atomic_files import write_json
from dist_train.distributed.process_info import ASKED_AT, OF_ONE_WANDB_RUN, RECORDED
from dist_train.errors import RunDirError
from dist_train.launch.jobs import is_active, unfinished_jobs
from dist_train.launch.slurm import commands
from dist_train.launch.subprocesses import begin_detached
from dist_train.runs.directory import RunDir
from dist_train.runs.start_lock import hold_start_lock, note_start
from dist_train.runs.start_options import free_name
from dist_train.runs.summary import Summary, summarise_existing


def start_log(run_dir: RunDir) -> Path:
    """Return the log of the last start that was made from outside a shell: what it printed."""
    return run_dir.logs / "start.log"


def resume_command(run_dir: RunDir) -> list[str] | None:
    """Return the command that resumes a run; None if that depends on its machines, or on a Slurm job of the user's."""
    script = run_dir.path / "job.sbatch"
    if script.is_file():
        return ["sbatch", str(script)]
    elsewhere = _recorded(run_dir).get("num_nodes", 1) != 1 or run_dir.status.read().get("slurm_job_id")
    return None if elsewhere else _train_command(run_dir)


def _train_command(run_dir: RunDir) -> list[str]:
    recorded = _recorded(run_dir)
    options = ["--resume", str(run_dir.path), "--nproc", str(_world_size(run_dir, recorded)), *_init_from(recorded)]
    return [*_program(recorded), "train", *options]


def _world_size(run_dir: RunDir, recorded: Mapping[str, Any]) -> int:
    return run_dir.status.read().get("world_size") or recorded.get("world_size") or recorded.get("nproc") or 1


def _program(recorded: Mapping[str, Any]) -> list[str]:
    return [recorded.get("python", sys.executable), "-m", "dist_train"]


def _init_from(recorded: Mapping[str, Any]) -> list[str]:
    """Return the option of a run that begins with the weights of another one."""
    other = recorded.get("init_from")
    return ["--init-from", other] if other else []


def resume(path: Path) -> None:
    """Start a run again from its last checkpoint: with its interpreter, folder and environment, or as its Slurm job.

    Returns at once. What the start prints before it has a status is in `start_log`.

    Raises:
        RunDirError: it is running, finished or starting, its job is in the queue, it ran on several machines or in a
            job that `slurm submit` did not make, or its folder or interpreter is gone.
        LaunchError: Slurm refuses the job.
    """
    summary = summarise_existing(path)
    run_dir = summary.run_dir
    if summary.may_be_running or summary.state == "FINISHED":
        raise RunDirError(f"{summary.name} is {summary.state}: there is nothing to resume.")
    if summary.state in ("CREATED", "QUEUED"):
        raise RunDirError(f"{summary.name} is {summary.state}: the queue begins it.")
    command = resume_command(run_dir)
    if command is None:
        raise RunDirError(
            f"{summary.name} ran on several machines or in a Slurm job of your own. Run the same command again there."
        )
    with hold_start_lock(run_dir) as lock:
        if command[0] == "sbatch":
            recorded = _recorded(run_dir)
            _submit_again(summary, _existing(recorded), environment_of(recorded))
            return
        begin_start(run_dir, lock)


def begin_start(run_dir: RunDir, lock: int) -> None:
    """Begin the launcher of a run as files of the run tell. `lock`: of `hold_start_lock`; the launcher keeps it.

    Raises:
        RunDirError: its folder or its interpreter is gone, or its directory cannot be written.
    """
    recorded = _recorded(run_dir)
    folder = _existing(recorded)
    try:
        run_dir.logs.mkdir(exist_ok=True)
        asked_at = {ASKED_AT: repr(time.perf_counter())}  # a STOP file from now on is meant for this start
        note_start(run_dir)
        environment = environment_of(recorded) | asked_at
        begin_detached(_train_command(run_dir), start_log(run_dir), folder, environment, inherited=lock)
    except OSError as error:
        raise RunDirError(f"{run_dir.path.name} cannot be started: {error.filename}: {error.strerror}.") from None


def _recorded(run_dir: RunDir) -> dict[str, Any]:
    """Return how the run was started. A job of the queue or of Slurm may not have begun yet, or not have got far."""
    return run_dir.read_job() | run_dir.read_submission() | run_dir.read_provenance()


def _submit_again(summary: Summary, folder: Path, environment: Mapping[str, str]) -> None:
    job = unfinished_jobs([summary]).get(summary.job or "")
    if is_active(job):
        raise RunDirError(f"Job {summary.job} of {summary.name} waits or runs already.")
    run_dir = summary.run_dir
    new = commands.submit((run_dir.path / "job.sbatch").read_text(), folder, environment)
    write_json(run_dir.slurm_json, run_dir.read_submission() | {"job": new, "submitted": round(time.time(), 3)})


def describe_command(run_dir: RunDir) -> str | None:
    """Return the command that resumes the run, for a shell in any folder; None as `resume_command`."""
    command = resume_command(run_dir)
    return _for_shell(command, _recorded(run_dir)) if command is not None else None


def describe_new_start(run_dir: RunDir) -> str | None:
    """Return the command that trains the same anew under another name, for a shell in any folder.

    For a run on several machines without Slurm it is the command for each of them. None: there are no settings yet.
    """
    if not run_dir.config.is_file():
        return None
    provenance = _recorded(run_dir)
    ranks = _world_size(run_dir, provenance)
    nodes = provenance.get("num_nodes") or 1
    where = ["train", "--nproc", str(ranks)]
    if "job" in provenance or run_dir.status.read().get("slurm_job_id"):
        options = provenance.get("options", [f"--nodes={nodes}", f"--nproc={ranks // nodes}"])
        where = ["slurm", "submit", *options]
    elif nodes > 1:
        meeting_point = next(iter(provenance.get("hosts", [])), "HOST")
        where = ["launch", f"--nnodes={nodes}", f"--rdzv-endpoint={meeting_point}", "--nproc", str(ranks // nodes)]
    precision = provenance.get("mixed_precision", "no")  # a launcher may have set it
    settings = ["-o", f"mixed_precision={precision}"] if precision != "no" else []
    what = [
        "-c",
        str(run_dir.config),
        "--run-name",
        free_name(run_dir.path.name, run_dir.path.parent),
        *settings,
        *_init_from(provenance),
    ]
    threads = {"OMP_NUM_THREADS": str(provenance["num_threads"])} if "num_threads" in provenance else {}
    recorded = provenance | {"environment": provenance.get("environment", {}) | threads}
    return _for_shell([*_program(provenance), *where, *what], recorded)


def _for_shell(command: Sequence[str], provenance: Mapping[str, Any]) -> str:
    """Return a command with the folder and the environment that were recorded."""
    settings = [f"{name}={shlex.quote(value)}" for name, value in sorted(provenance.get("environment", {}).items())]
    folder = [f"cd {shlex.quote(provenance['cwd'])} &&"] if "cwd" in provenance else []
    return " ".join([*folder, *settings, shlex.join(command)])


def _existing(provenance: Mapping[str, Any]) -> Path:
    folder = Path(provenance.get("cwd", "."))
    if not folder.is_dir():
        raise RunDirError(f"The run was started in {folder}, which does not exist any more. Create it again.")
    return folder


def environment_of(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Return our environment with the variables that were recorded; what the run did not set stays unset."""
    recorded = provenance.get("environment")
    replaced = OF_ONE_WANDB_RUN if recorded is None else (*OF_ONE_WANDB_RUN, *RECORDED)
    return {name: value for name, value in os.environ.items() if name not in replaced} | (recorded or {})
