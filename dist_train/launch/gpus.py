"""The GPUs of this machine as their driver sees them, without torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from dist_train.errors import LaunchError
from dist_train.launch.subprocesses import output_of_program

_DRIVER = Path("/dev/nvidiactl")
_TIMEOUT_S = 10.0


def all_gpus() -> list[str]:
    """Return the UUIDs of the GPUs by their index; [] where there is no driver.

    Raises:
        LaunchError: the driver does not answer.
    """
    return _ask("gpu", "uuid")


def busy_gpus() -> set[str]:
    """Return the UUIDs of the GPUs that a process computes on, also one that the queue did not begin.

    Raises:
        LaunchError: the driver does not answer.
    """
    return set(_ask("compute-apps", "gpu_uuid"))


def visible(gpus: Sequence[str], devices: str | None) -> list[str]:
    """Return those of `gpus` that CUDA_VISIBLE_DEVICES=`devices` names, by index or UUID. None: it is not set."""
    if devices is None:
        return [*gpus]
    by_index = {str(index): gpu for index, gpu in enumerate(gpus)}
    names = [name.strip() for name in devices.split(",")]
    return [gpu for name in names if (gpu := by_index.get(name) or _by_prefix(gpus, name)) is not None]


def _by_prefix(gpus: Collection[str], name: str) -> str | None:
    return next((gpu for gpu in gpus if name and gpu.startswith(name)), None)


def query(what: str, columns: str) -> list[list[str]]:
    """Return the rows of `nvidia-smi --query-WHAT=COLUMNS`.

    Raises:
        LaunchError: there is no driver, or it does not answer.
    """
    options = (f"--query-{what}={columns}", "--format=csv,noheader,nounits")
    lines = output_of_program("nvidia-smi", *options, timeout_s=_TIMEOUT_S).splitlines()
    rows = [[cell.strip() for cell in line.split(",")] for line in lines]
    return [row for row in rows if len(row) == columns.count(",") + 1]


def _ask(what: str, column: str) -> list[str]:
    try:
        return [uuid for (uuid,) in query(what, column) if uuid.startswith("GPU-")]
    except LaunchError:
        if _DRIVER.exists():  # no answer does not mean no GPU: two jobs must not get the same
            raise
        return []
