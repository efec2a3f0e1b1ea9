"""The memory available for a data set."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def available_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the machine's free memory, limited by the control groups of this process; None if unknown.

    A Slurm job or a container is often limited to far less than the machine has.
    """
    limits = [limit for limit in (_free(proc / "meminfo"), *_group_limits(proc, cgroups)) if limit is not None]
    return min(limits, default=None)


def fits(num_bytes: int, free: int | None, ranks_per_node: int) -> bool:
    """Whether each rank of a node can keep so many bytes in half of the free memory; also if that is unknown."""
    return free is None or num_bytes <= free // 2 // ranks_per_node


def _free(meminfo: Path) -> int | None:
    with suppress(OSError, ValueError, IndexError):
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _group_limits(proc: Path, cgroups: Path) -> list[int | None]:
    """Return the limit of each control group (v1 and v2) of this process, from its own up to the root."""
    limits: list[int | None] = []
    with suppress(OSError):
        for line in (proc / "self" / "cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                top, name = cgroups, "memory.max"
            elif "memory" in controllers.split(","):
                top, name = cgroups / "memory", "memory.limit_in_bytes"
            else:
                continue
            inner = Path(path.lstrip("/"))
            limits += [_number(top / group / name) for group in (inner, *inner.parents)]
    return limits


def _number(path: Path) -> int | None:
    with suppress(OSError, ValueError):  # "max" means no limit
        return int(path.read_text())
    return None
