"""This machine, as the page shows it: processors, memory, disk, GPUs."""

from __future__ import annotations

import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

from dist_train.errors import LaunchError
from dist_train.launch.gpus import query
from dist_train.web.background import Background

_EVERY_S = 5.0  # between questions to the GPUs' driver


@dataclass(frozen=True)
class Gpu:
    name: str
    load: float | None  # percent
    used_mib: float | None
    total_mib: float | None
    processes: tuple[int, ...]  # ids of those that compute on it


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


class MachineWatch:
    """Reads the machine's state when somebody looks. What the GPUs' driver says is shown at the next look."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._gpus = Background[list[Gpu]](_ask_driver, [], _EVERY_S)

    def look(self) -> Machine:
        memory, clock = psutil.virtual_memory(), psutil.cpu_freq()
        return Machine(
            host=socket.gethostname(),
            cores=psutil.cpu_count() or 1,
            load=psutil.getloadavg()[0],
            mhz=clock.current if clock else None,
            memory_used=memory.total - memory.available,
            memory_total=memory.total,
            disk_free=free_bytes(self._folder),
            gpus=self._gpus.latest(),
        )


def free_bytes(folder: Path) -> int | None:
    """Return the free space where a folder is, or would be. None if the file system does not say."""
    try:
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _ask_driver(_before: list[Gpu]) -> list[Gpu]:
    """Return the GPUs; none without nvidia-smi."""
    try:
        gpus = query("gpu", "uuid,name,utilization.gpu,memory.used,memory.total")
        computing = query("compute-apps", "gpu_uuid,pid")
    except LaunchError:
        return []
    return [
        Gpu(
            name, _number(load), _number(used), _number(total),
            tuple(int(pid) for gpu, pid in computing if gpu == uuid and pid.isdigit()),
        )
        for uuid, name, load, used, total in gpus
    ]  # fmt: skip


def _number(text: str) -> float | None:
    """Return a number; None for what the driver does not know, such as [N/A]."""
    return float(text) if text.replace(".", "", 1).isdigit() else None
