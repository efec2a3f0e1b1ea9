"""This machine, as the page shows it: processors, memory, disk, GPUs, and Slurm's partitions."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from dist_train.errors import LaunchError
from dist_train.launch.slurm import commands
from dist_train.launch.slurm.commands import Partition
from dist_train.launch.subprocesses import output_of_program

_EVERY_S = 30.0  # between questions to Slurm and to the GPU's driver


@dataclass(frozen=True)
class Gpu:
    name: str
    load: float | None  # percent
    used_mib: float | None
    total_mib: float | None


@dataclass(frozen=True)
class Machine:
    host: str
    cores: int
    load: float  # processes that ran or waited for a processor, on average over the last minute
    mhz: float | None
    memory_used: int  # bytes
    memory_total: int
    disk_free: int | None  # bytes, where the runs are
    gpus: list[Gpu]
    partitions: dict[str, Partition]


class MachineWatch:
    """Reads the machine's state when somebody looks. Slow answers come from a thread and are shown at the next look."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._asked = -_EVERY_S
        self._gpus: list[Gpu] = []
        self._partitions: dict[str, Partition] = {}

    def look(self) -> Machine:
        with self._lock:
            if time.monotonic() - self._asked >= _EVERY_S:
                self._asked = time.monotonic()
                threading.Thread(target=self._ask, name="machine", daemon=True).start()
        memory, clock = psutil.virtual_memory(), psutil.cpu_freq()
        return Machine(
            host=socket.gethostname(),
            cores=psutil.cpu_count() or 1,
            load=psutil.getloadavg()[0],
            mhz=clock.current if clock else None,
            memory_used=memory.total - memory.available,
            memory_total=memory.total,
            disk_free=free_bytes(self._folder),
            gpus=self._gpus,
            partitions=self._partitions,
        )

    def _ask(self) -> None:
        self._gpus = _gpus()
        try:
            self._partitions = commands.partitions()
        except LaunchError:
            self._partitions = {}


def free_bytes(folder: Path) -> int | None:
    """Return the free space where a folder is, or would be. None if the file system does not say."""
    try:
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _gpus() -> list[Gpu]:
    query = "--query-gpu=name,utilization.gpu,memory.used,memory.total"
    try:
        text = output_of_program("nvidia-smi", query, "--format=csv,noheader,nounits", timeout_s=5.0)
    except LaunchError:
        return []
    found = []
    for line in text.splitlines():
        name, *numbers = (part.strip() for part in line.rsplit(",", 3))
        load, used, total = (float(each) if each.replace(".", "", 1).isdigit() else None for each in numbers)
        found.append(Gpu(name, load, used, total))
    return found
