"""Slurm by its own commands: what a TERM means, whether a job is queued again, submit, state, cancel."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from dist_train.environment import slurm_job
from dist_train.errors import LaunchError, PeerLost
from dist_train.run_dir import RunDir, read_json
from dist_train.stop_request import StopState

_ANSWER_S = 30.0  # a busy controller may take that long
_FRUITLESS = 2  # starts that saved nothing new, after which one more has no prospect


def judge_term(env: Mapping[str, str]) -> StopState:
    """What a TERM means to one of a job's processes: a preemption while the job goes on, else that it is cancelled.

    A job that ends within the grace of a preemption is not queued again by Slurm itself.
    """
    job = slurm_job(env)
    if job is None or not env.get("SLURM_STEP_ID"):
        return "INTERRUPT"
    try:
        said = _ask("scontrol", "show", "job", "--oneliner", job, timeout_s=5.0)
    except LaunchError:
        return "PREEMPTED"  # whoever cancels a job reaches the controller too
    return "PREEMPTED" if "JobState=RUNNING" in said.split() else "INTERRUPT"


Decision = Literal["requeue", "ended", "failed"]


def decide_requeue(run_dir: RunDir, env: Mapping[str, str], max_requeues: int) -> tuple[Decision, str]:
    """What is to become of a job whose step has ended, and why; by what the run says of itself, not by exit codes."""
    status = run_dir.read_status()
    state, error = status.get("state"), read_json(run_dir.error)
    restarts = int(env.get("SLURM_RESTART_COUNT") or 0)
    if state == "FINISHED":
        return "ended", "state FINISHED"
    if error and error.get("kind") != PeerLost.__name__:
        return "failed", error["message"]
    of_this_start = status.get("slurm_job_id"), int(status.get("slurm_restart_count") or 0)
    if state is None or of_this_start != (slurm_job(env), restarts):
        return "failed", "this start ended before the training had begun"
    if state == "INTERRUPT":
        return "ended", "state INTERRUPT"
    why = f"state {state}" if state == "PREEMPTED" else "a rank or its node was lost"
    if state != "PREEMPTED" and status.get("fruitless_starts", 0) >= _FRUITLESS:
        return "failed", f"{why}, and so {_FRUITLESS + 1} starts in a row ended without a new checkpoint"
    if restarts >= max_requeues:
        return "failed", f"{why}, but this was start {restarts + 1} and --max-requeues={max_requeues}"
    return "requeue", why


@dataclass(frozen=True)
class Job:
    """What Slurm says of a job."""

    state: str  # PENDING, RUNNING, COMPLETED, ...; UNKNOWN if Slurm has forgotten it
    reason: str = ""  # why it waits, or on which nodes it runs
    time: str = ""


def submit(script: str) -> str:
    """The id of the new job.

    Raises:
        LaunchError: no sbatch, or what Slurm has against the job.
    """
    said = _ask("sbatch", "--parsable", text=script)
    return said.strip().partition(";")[0]


def jobs(ids: Iterable[str]) -> dict[str, Job]:
    """The state of each job. Works where accounting is off, for as long as the controller remembers them."""
    wanted = list(ids)
    found = dict.fromkeys(wanted, Job("UNKNOWN"))
    for line in _ask("squeue", "--noheader", "--states=all", "--format=%i|%T|%R|%M").splitlines():
        job, state, reason, time = line.split("|", 3)
        if job in found:
            found[job] = Job(state, reason, time)
    missing = [job for job, each in found.items() if each.state == "UNKNOWN"]
    if missing:
        try:
            said = _ask("sacct", "-X", "-n", "-P", "-j", ",".join(missing), "-o", "JobID,State,NodeList,Elapsed")
        except LaunchError:
            said = ""  # accounting is off
        for line in said.splitlines():
            job, state, nodes, time = line.split("|", 3)
            found[job] = Job(state.split()[0], nodes, time)
    return found


def partitions() -> list[str]:
    return sorted(set(_ask("sinfo", "--noheader", "--format=%R").split()))


def cancel(job: str) -> None:
    _ask("scancel", job)


def _ask(*command: str, text: str | None = None, timeout_s: float = _ANSWER_S) -> str:
    """What a command of Slurm prints.

    Raises:
        LaunchError: it is not here, does not answer, or refuses; with its own words.
    """
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=timeout_s)
    except FileNotFoundError:
        raise LaunchError(
            f"No {command[0]} on PATH: this is no submit host of a Slurm cluster. Log in to one (or load its module)."
        ) from None
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{command[0]} did not answer within {timeout_s:.0f} s. Try again later.") from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise LaunchError(f"{command[0]}: {said.removeprefix(f'{command[0]}: ')}")
    return done.stdout
