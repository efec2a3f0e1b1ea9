"""Slurm by its own commands: what a TERM means, whether a job is queued again, submit, state, cancel."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from dist_train.errors import LaunchError

# What a script says itself: sbatch would believe the environment more than the script that was checked.
_SAID_BY_SCRIPT = (
    "SBATCH_JOB_NAME", "SBATCH_OPEN_MODE", "SBATCH_OUTPUT", "SBATCH_PARTITION", "SBATCH_REQUEUE", "SBATCH_NO_REQUEUE",
    "SBATCH_SIGNAL", "SBATCH_TIMELIMIT",
)  # fmt: skip
_ANSWER_S = 30.0  # a busy controller may take that long


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
