"""Resume a run as it was started, in processes that outlive this one."""

from __future__ import annotations

import fcntl
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dist_train.atomic_files import write_json
from dist_train.distributed.process_info import OF_ONE_WANDB_RUN
from dist_train.errors import RunDirError
from dist_train.launch.slurm import commands
from dist_train.launch.subprocesses import begin_detached
from dist_train.runs.directory import RunDir
from dist_train.runs.summary import summarise_existing

_LOCK = ".start.lock"  # held by a start from its command on, before it has a status


def start_log(run_dir: RunDir) -> Path:
    """Return the log of the last start that `resume` made: what it printed before it had a status."""
    return run_dir.logs / "start.log"


def resume_command(run_dir: RunDir) -> list[str] | None:
    """Return the command that resumes a run; None if it must be started on several machines by hand."""
    script, provenance = run_dir.path / "job.sbatch", run_dir.read_provenance()
    if script.is_file():
        return ["sbatch", str(script)]
    if provenance.get("num_nodes", 1) != 1 or run_dir.status.read().get("slurm_job_id"):
        return None
    nproc = run_dir.status.read().get("world_size") or 1
    python = provenance.get("python", sys.executable)
    return [python, "-m", "dist_train", "train", "--resume", str(run_dir.path), "--nproc", str(nproc)]


def resume(path: Path) -> None:
    """Start a run again from its last checkpoint: with its interpreter, folder and environment, or as its Slurm job.

    Returns at once. What the start prints before it has a status is in `start_log`.

    Raises:
        RunDirError: it is running, finished or starting, or ran on several machines without Slurm.
        LaunchError: Slurm refuses the job.
    """
    summary = summarise_existing(path)
    run_dir = summary.run_dir
    if summary.may_be_running or summary.state == "FINISHED":
        raise RunDirError(f"{summary.name} is {summary.state}: there is nothing to resume.")
    command = resume_command(run_dir)
    if command is None:
        raise RunDirError(f"{summary.name} ran on several machines. Run the same command on each of them again.")
    if command[0] == "sbatch":
        job = commands.submit((run_dir.path / "job.sbatch").read_text())
        write_json(run_dir.slurm_json, run_dir.read_submission() | {"job": job, "submitted": round(time.time(), 3)})
        return
    provenance = run_dir.read_provenance()
    with _starting(run_dir) as lock:
        run_dir.logs.mkdir(exist_ok=True)
        begin_detached(
            command,
            log=start_log(run_dir),
            folder=_existing(provenance),
            environment=_environment(provenance),
            inherited=lock,
        )


def is_starting(run_dir: RunDir) -> bool:
    """Whether a start that `resume` made has not ended. Writes nothing."""
    try:
        with (run_dir.path / _LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # never resumed
        pass
    return False


def describe_command(run_dir: RunDir) -> str | None:
    """Return the command that resumes the run, for a shell in any folder; None as `resume_command`."""
    command, provenance = resume_command(run_dir), run_dir.read_provenance()
    if command is None:
        return None
    settings = [f"{name}={shlex.quote(value)}" for name, value in sorted(provenance.get("environment", {}).items())]
    folder = [f"cd {shlex.quote(provenance['cwd'])} &&"] if "cwd" in provenance else []
    return " ".join([*folder, *settings, shlex.join(command)])


def _existing(provenance: Mapping[str, Any]) -> Path:
    folder = Path(provenance.get("cwd", "."))
    if not folder.is_dir():
        raise RunDirError(f"The run was started in {folder}, which does not exist any more. Create it again.")
    return folder


def _environment(provenance: Mapping[str, Any]) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if name not in OF_ONE_WANDB_RUN}
    return ours | dict(provenance.get("environment", {}))


@contextmanager
def _starting(run_dir: RunDir) -> Iterator[int]:
    """Hold the lock of a start; a child process that inherits the descriptor keeps it until it ends.

    Raises:
        RunDirError: another start holds it, or the directory cannot be written.
    """
    try:
        descriptor = os.open(run_dir.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise RunDirError(f"{run_dir.path} cannot be written: {error.strerror}.") from None
    try:
        if not _acquire(descriptor):
            raise RunDirError(f"{run_dir.path.name} is being started already.")
        yield descriptor
    finally:
        os.close(descriptor)


def _acquire(descriptor: int) -> bool:
    for _ in range(10):
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.05)  # `is_starting` holds it for a moment
    return False
