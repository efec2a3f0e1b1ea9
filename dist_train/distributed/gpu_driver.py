"""Whether this machine has a GPU driver, without torch: for what is checked before processes start."""

from __future__ import annotations

import ctypes
from pathlib import Path

from dist_train.errors import ConfigError


def check_gpu_driver(device: str) -> None:
    """Check that there is a driver if `device` is cuda. With one, only torch can tell whether it finds a device.

    Raises:
        ConfigError: there is none.
    """
    if device != "cuda" or Path("/dev/kfd").exists():  # AMD's driver: torch calls its devices cuda, too
        return
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise not_available("cuda", "no GPU driver is installed") from None


def not_available(device: str, why: str = "") -> ConfigError:
    """Return the error that is raised for a device that this machine lacks."""
    return ConfigError(
        f"device={device}, but no {device.upper()} device is available here{f': {why}' if why else ''}. "
        f"Set device=auto, which takes what there is, or device=cpu."
    )
