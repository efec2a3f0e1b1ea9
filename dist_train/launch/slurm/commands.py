"""Slurm by its own commands: what a TERM means, whether a job is queued again, submit, state, cancel."""

from __future__ import annotations

import logging
import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from dist_train.distributed.process import slurm_job
from dist_train.distributed.signals import StopState
from dist_train.errors import LaunchError, PeerLost
from dist_train.runs.directory import RunDir
from dist_train.runs.error_report import describe_error

_log = logging.getLogger(__name__)

# What a script says itself: sbatch would believe the environment more than the script that was checked.
_SAID_BY_SCRIPT = (
    "SBATCH_JOB_NAME", "SBATCH_OPEN_MODE", "SBATCH_OUTPUT", "SBATCH_PARTITION", "SBATCH_REQUEUE", "SBATCH_NO_REQUEUE",
    "SBATCH_SIGNAL", "SBATCH_TIMELIMIT",
)  # fmt: skip
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
        goes_on = "JobState=RUNNING" in _describe(job)
    except LaunchError:
        return "PREEMPTED"  # whoever cancels a job reaches the controller too
    return "PREEMPTED" if goes_on else "INTERRUPT"


def check_save_time(save_s: float, env: Mapping[str, str]) -> None:
    """Warn if a preemption would not leave this job the time to save."""
    partition = env.get("SLURM_JOB_PARTITION")
    if slurm_job(env) is None or not partition:
        return
    with suppress(LaunchError):
        found = dict(
            word.partition("=")[::2] for word in ask("scontrol", "show", "partition", partition, timeout_s=5.0).split()
        )
        kill_wait = re.search(r"^KillWait\s*=\s*(\d+)", ask("scontrol", "show", "config", timeout_s=5.0), re.MULTILINE)
        if found.get("PreemptMode", "OFF") == "OFF" or kill_wait is None:
            return
        grace_s, kill_wait_s = int(found.get("GraceTime", 0)), int(kill_wait[1])
        if save_s > grace_s + kill_wait_s:
            _log.warning(
                "a save takes %.0f s, and partition %s leaves a preempted job %d s (GraceTime=%d + KillWait=%d): it "
                "would go on from the last periodic save. Ask for a longer GraceTime, or lower save_every.",
                save_s, partition, grace_s + kill_wait_s, grace_s, kill_wait_s,
            )  # fmt: skip


Decision = Literal["requeue", "ended", "failed"]


def decide_requeue(
    run_dir: RunDir, env: Mapping[str, str], max_requeues: int, *, told: bool = False
) -> tuple[Decision, str]:
    """What is to become of a job whose step has ended, and why; by what the run says of itself, not by exit codes.

    `told`: the batch shell was, by the time limit or by someone, which the ranks may have been too young to hear.
    """
    status = run_dir.read_status()
    state, error = status.get("state"), run_dir.read_error()
    restarts = int(env.get("SLURM_RESTART_COUNT") or 0)
    if state == "FINISHED":
        return "ended", "state FINISHED"
    if error and error.get("kind") != PeerLost.__name__:
        return "failed", describe_error(error)
    of_this_start = status.get("slurm_job_id"), int(status.get("slurm_restart_count") or 0)
    if state is None or of_this_start != (slurm_job(env), restarts):
        state, why = "PREEMPTED", "told to stop before the training had begun"
        if not is_preempted(env):
            if not told:
                return "failed", "this start ended before the training had begun"
            unbegun = restarts - of_this_start[1] if of_this_start[0] == slurm_job(env) else restarts + 1
            if unbegun > _FRUITLESS:
                return "failed", f"{why}, and so were {unbegun} starts in a row. Ask for more --time."
    elif state == "INTERRUPT":
        return "ended", "state INTERRUPT"
    else:
        why = f"state {state}" if state == "PREEMPTED" else "a rank or its node was lost"
    if state != "PREEMPTED" and status.get("fruitless_starts", 0) >= _FRUITLESS:
        return "failed", f"{why}, and so {_FRUITLESS + 1} starts in a row ended without a new checkpoint"
    if restarts >= max_requeues:
        return "failed", f"{why}, but this was start {restarts + 1} and --max-requeues={max_requeues}"
    return "requeue", why


def is_preempted(env: Mapping[str, str]) -> bool:
    """Whether a job of higher priority has asked for the nodes of this one."""
    with suppress(LaunchError):
        said = _describe(slurm_job(env) or "")
        return any(word.startswith("PreemptTime=") and word != "PreemptTime=None" for word in said)
    return False


def _describe(job: str) -> list[str]:
    """What the controller knows of a job, as KEY=VALUE.

    Raises:
        LaunchError: it does not answer, or has forgotten the job.
    """
    return ask("scontrol", "show", "job", "--oneliner", job, timeout_s=5.0).split()


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
    env = {name: value for name, value in os.environ.items() if name not in _SAID_BY_SCRIPT}
    said = ask("sbatch", "--parsable", text=script, env=env)
    return said.strip().partition(";")[0]


def jobs(ids: Iterable[str]) -> dict[str, Job]:
    """The state of each job. Works where accounting is off, for as long as the controller remembers them."""
    wanted = list(ids)
    found = dict.fromkeys(wanted, Job("UNKNOWN"))
    for line in ask("squeue", "--noheader", "--states=all", "--format=%i|%T|%R|%M").splitlines():
        job, state, reason, time = line.split("|", 3)
        if job in found:
            found[job] = Job(state, reason, time)
    missing = [job for job, each in found.items() if each.state == "UNKNOWN"]
    if missing:
        try:
            said = ask("sacct", "-X", "-n", "-P", "-j", ",".join(missing), "-o", "JobID,State,NodeList,Elapsed")
        except LaunchError:
            said = ""  # accounting is off
        for line in said.splitlines():
            job, state, nodes, time = line.split("|", 3)
            found[job] = Job(state.split()[0], nodes, time)
    return found


@dataclass(frozen=True)
class Partition:
    """What a partition can give a job."""

    nodes: int  # those that are down counted too
    cpus: int  # of its largest node
    time_limit: str  # as in [D-]HH:MM:SS, or infinite
    is_default: bool


def partitions() -> dict[str, Partition]:
    found: dict[str, Partition] = {}
    kinds = ask("sinfo", "--exact", "--noconvert", "--noheader", "--format=%P|%D|%c|%l")
    for line in kinds.splitlines():  # one for each kind of node in it
        name, nodes, cpus, limit = line.split("|")
        former = found.get(name.rstrip("*"), Partition(0, 0, limit, name.endswith("*")))
        found[name.rstrip("*")] = replace(former, nodes=former.nodes + int(nodes), cpus=max(former.cpus, int(cpus)))
    return found


def installed_version() -> str:
    """As Slurm says it.

    Raises:
        LaunchError: it is not here.
    """
    return ask("sinfo", "--version").strip()


def cancel(job: str) -> None:
    ask("scancel", job)


def ask(
    *command: str, text: str | None = None, timeout_s: float = _ANSWER_S, env: Mapping[str, str] | None = None
) -> str:
    """What a command of Slurm prints.

    Raises:
        LaunchError: it is not here, does not answer, or refuses; with its own words.
    """
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=timeout_s, env=env)
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
