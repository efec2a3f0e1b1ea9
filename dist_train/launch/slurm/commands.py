"""Slurm's own commands: submit and cancel jobs, query jobs and partitions."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dist_train.errors import LaunchError

# Set by the script, so not passed on: sbatch's environment takes precedence over the script that was checked.
_SET_BY_SCRIPT = (
    "SBATCH_JOB_NAME", "SBATCH_OPEN_MODE", "SBATCH_OUTPUT", "SBATCH_PARTITION", "SBATCH_REQUEUE", "SBATCH_NO_REQUEUE",
    "SBATCH_SIGNAL", "SBATCH_TIMELIMIT",
)  # fmt: skip
_ANSWER_S = 30.0  # a busy controller may take this long
# By the last line that a command prints: the lines before it tell of each attempt to find or reach the controller.
_NO_CONTROLLER = (
    (
        r"configuration (source|file)",
        "finds no cluster",
        "Run this on a submit host of the cluster, or set SLURM_CONF to the cluster's slurm.conf.",
    ),
    (
        r"contact slurm controller|[Cc]onnect(ion)? (failure|refused|timed out)|Socket timed out",
        "gets no answer from Slurm's controller",
        "Try again later; scontrol ping tells whether it is up.",
    ),
)


@dataclass(frozen=True)
class Job:
    """What Slurm reports about a job."""

    state: str  # PENDING, RUNNING, COMPLETED, ...; UNKNOWN if Slurm has no record of it
    reason: str = ""  # why it waits, or the nodes it runs on
    time: str = ""


def submit(script: str, folder: Path | None = None, environment: Mapping[str, str] = os.environ) -> str:
    """Submit a batch script and return the job's id. `folder`: where the job runs; None: in the current one.

    Raises:
        LaunchError: there is no sbatch, or it rejects the job.
    """
    env = {name: value for name, value in environment.items() if name not in _SET_BY_SCRIPT}
    output = ask("sbatch", "--parsable", text=script, env=env, folder=folder)
    return output.strip().partition(";")[0]


def jobs(ids: Iterable[str]) -> dict[str, Job]:
    """Return the state of each job. Without accounting, this works as long as the controller remembers them."""
    wanted = list(ids)
    found = dict.fromkeys(wanted, Job("UNKNOWN"))
    for line in ask("squeue", "--noheader", "--states=all", "--format=%i|%T|%R|%M").splitlines():
        job, state, reason, time = line.split("|", 3)
        if job in found:
            found[job] = Job(state, reason, time)
    missing = [job for job, each in found.items() if each.state == "UNKNOWN"]
    if missing:
        try:
            output = ask("sacct", "-X", "-n", "-P", "-j", ",".join(missing), "-o", "JobID,State,NodeList,Elapsed")
        except LaunchError:
            output = ""  # accounting is off
        for line in output.splitlines():
            job, state, nodes, time = line.split("|", 3)
            found[job] = Job(state.split()[0], nodes, time)
    return found


@dataclass(frozen=True)
class Partition:
    """What a partition offers a job."""

    nodes: int  # including those that are down
    cpus: int  # of its largest node
    time_limit: str  # [D-]HH:MM:SS or infinite
    is_default: bool


def partitions(timeout_s: float = _ANSWER_S) -> dict[str, Partition]:
    """Return the partitions by name."""
    found: dict[str, Partition] = {}
    rows = ask("sinfo", "--exact", "--noconvert", "--noheader", "--format=%P|%D|%c|%l", timeout_s=timeout_s)
    for line in rows.splitlines():  # one for each kind of node in a partition
        name, nodes, cpus, limit = line.split("|")
        previous = found.get(name.rstrip("*"), Partition(0, 0, limit, name.endswith("*")))
        found[name.rstrip("*")] = replace(
            previous, nodes=previous.nodes + int(nodes), cpus=max(previous.cpus, int(cpus))
        )
    return found


@dataclass(frozen=True)
class NodeJob:
    """A job that runs on a node."""

    job: str
    user: str


@dataclass(frozen=True)
class Node:
    """A node of the cluster."""

    partitions: tuple[str, ...]
    state: str  # idle, mixed, allocated, down*, ...
    cpus: int
    cpus_allocated: int
    memory_mib: int
    gres: str  # such as gpu:h100:4; (null): none
    jobs: tuple[NodeJob, ...]

    @property
    def is_busy(self) -> bool:
        return bool(self.jobs) or self.cpus_allocated > 0


def nodes(timeout_s: float = _ANSWER_S) -> dict[str, Node]:
    """Return the nodes by name, each with the jobs that run on it."""
    jobs: dict[str, list[NodeJob]] = {}
    running = ask("squeue", "--noheader", "--states=RUNNING,COMPLETING", "--format=%i|%u|%N", timeout_s=timeout_s)
    for line in running.splitlines():
        job, user, where = line.split("|", 2)
        for name in names_in(where):
            jobs.setdefault(name, []).append(NodeJob(job, user))
    found: dict[str, Node] = {}
    rows = ask("sinfo", "--Node", "--noconvert", "--noheader", "--format=%N|%R|%T|%C|%m|%G", timeout_s=timeout_s)
    for line in rows.splitlines():  # one for each partition of a node
        name, partition, state, cpus, memory, gres = line.split("|")
        allocated, _idle, _other, total = map(int, cpus.split("/"))
        others = found[name].partitions if name in found else ()
        found[name] = Node((*others, partition), state, total, allocated, int(memory), gres, tuple(jobs.get(name, [])))
    return found


def names_in(nodelist: str) -> list[str]:
    """Return the names of a Slurm node list: n7, n08 and n09 of "n7,n[08-09]"."""
    found = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist):
        pieces = [_numbers(piece) if number % 2 else [piece] for number, piece in enumerate(re.split(r"[\[\]]", part))]
        found += ["".join(pieces) for pieces in itertools.product(*pieces)]
    return found


def _numbers(ranges: str) -> list[str]:
    """Return the numbers of "08-10,12" with the zeros of each first one."""
    found = []
    for each in ranges.split(","):
        first, _, last = each.partition("-")
        found += [f"{number:0{len(first)}}" for number in range(int(first), int(last or first) + 1)]
    return found


def installed_version() -> str:
    """Return Slurm's version.

    Raises:
        LaunchError: Slurm is not installed.
    """
    return ask("sinfo", "--version").strip()


def cancel(job: str) -> None:
    """Cancel a job."""
    ask("scancel", job)


def ask(
    *command: str,
    text: str | None = None,
    timeout_s: float = _ANSWER_S,
    env: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> str:
    """Run a Slurm command and return its stdout.

    Raises:
        LaunchError: the command is not installed, does not answer, or fails; with its own message.
    """
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=timeout_s, env=env, cwd=folder
        )
    except FileNotFoundError:
        raise LaunchError(
            f"No {command[0]} on PATH: this is not a submit host of a Slurm cluster. Log in to one or load its module."
        ) from None
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{command[0]} did not answer within {timeout_s:.0f} s. Try again later.") from None
    if done.returncode:
        raise _failure(command[0], done.stderr.splitlines() or [f"exit code {done.returncode}"])
    return done.stdout


def _failure(name: str, said: Sequence[str]) -> LaunchError:
    """Return the error of a command that failed. `said`: the lines that it printed."""
    lines = [" ".join(re.sub(rf"^{name}: (error: |fatal: )?", "", line).split()) for line in said]
    for pattern, problem, fix in _NO_CONTROLLER:
        if re.search(pattern, lines[-1]):
            return LaunchError(f"{name} {problem}: {lines[-1]}. {fix}")
    return LaunchError(f"{name}: {' '.join(lines)}")
