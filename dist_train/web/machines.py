"""All machines that the page knows: this one, others that runs are on, and Slurm's nodes; and who uses them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import psutil

from dist_train.distributed.process_info import RUN_DIR
from dist_train.errors import LaunchError
from dist_train.launch.slurm import commands
from dist_train.launch.slurm.commands import Node, Partition
from dist_train.web.background import Background
from dist_train.web.run_index import Entry, RunIndex
from dist_train.web.this_machine import Machine, MachineWatch

_EVERY_S = 10.0  # between questions to Slurm
_ANSWER_S = 8.0


@dataclass(frozen=True)
class Cluster:
    """What Slurm said last."""

    partitions: Mapping[str, Partition] = field(default_factory=dict)
    nodes: Mapping[str, Node] = field(default_factory=dict)
    error: str | None = None  # why the last question had no answer; the rest is then that of the one before


@dataclass(frozen=True)
class Overview:
    """All machines at one moment."""

    here: Machine
    cluster: Cluster
    runs: Mapping[str, list[Entry]]  # that may be running, by host
    jobs: Mapping[str, Entry]  # the same by Slurm job
    gpu_users: list[list[str]]  # for each GPU of this machine: runs, or processes of others

    @property
    def elsewhere(self) -> list[str]:
        """The hosts of runs that are neither this machine nor nodes of Slurm."""
        return [host for host in self.runs if host != self.here.host and host not in self.cluster.nodes]

    @property
    def total(self) -> int:
        return len({self.here.host, *self.cluster.nodes, *self.runs})

    @property
    def busy(self) -> int:
        return len({*self.runs, *(name for name, node in self.cluster.nodes.items() if node.is_busy)})


class Machines:
    """Looks at all machines. Never waits for Slurm or for a driver. Safe to use from several threads."""

    def __init__(self, index: RunIndex) -> None:
        self._index = index
        self._here = MachineWatch(index.folder)
        self._cluster = Background[Cluster](_ask_slurm, Cluster(), _EVERY_S)

    def look(self) -> Overview:
        here = self._here.look()
        running = [entry for entry in self._index.listing().entries.values() if entry.summary.may_be_running]
        runs: dict[str, list[Entry]] = {}
        for entry in running:
            for host in _hosts_of(entry):
                runs.setdefault(host, []).append(entry)
        return Overview(
            here=here,
            cluster=self._cluster.latest(),
            runs=runs,
            jobs={entry.summary.job: entry for entry in running if entry.summary.job},
            gpu_users=[_users(gpu.processes, runs.get(here.host, [])) for gpu in here.gpus],
        )


def _ask_slurm(before: Cluster) -> Cluster:
    if shutil.which("sinfo") is None:
        return Cluster()
    try:
        return Cluster(commands.partitions(_ANSWER_S), commands.nodes(_ANSWER_S))
    except LaunchError as error:
        return replace(before, error=str(error))


def _hosts_of(entry: Entry) -> list[str]:
    """Return the machines of a run that is at work: of the newest start, else that of its rank zero."""
    run_dir = entry.summary.run_dir
    host = run_dir.status.read().get("host")
    recorded = run_dir.read_provenance().get("hosts", [])
    return list(dict.fromkeys(recorded)) if host in recorded else [host] if host else []


def _users(processes: Iterable[int], running: Iterable[Entry]) -> list[str]:
    """Return the names of the runs that processes of this machine belong to, or who else they are."""
    by_pid = {entry.summary.run_dir.status.read().get("pid"): entry.name for entry in running}
    by_folder = {str(entry.summary.run_dir.path): entry.name for entry in running}
    names = (by_pid.get(pid) or by_folder.get(_run_dir_of(pid)) or f"process {pid}" for pid in processes)
    return list(dict.fromkeys(names))


def _run_dir_of(pid: int) -> str:
    """Return the run directory that our launcher gave a process; "" if it is no rank, or not ours to ask."""
    try:
        return psutil.Process(pid).environ().get(RUN_DIR, "")
    except psutil.Error:
        return ""
