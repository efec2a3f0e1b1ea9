"""What one rank computes with: its device, precision and memory."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Mapping
from typing import cast

import torch

from dist_train.config.schema import Config, Precision
from dist_train.distributed.process import ProcessInfo
from dist_train.errors import ConfigError, LaunchError


def choose_device(config: Config, place: ProcessInfo) -> str:
    """cuda, else mps for one process, else cpu."""
    wanted = config.device
    if wanted == "auto":
        if torch.cuda.is_available():
            wanted = "cuda"
        else:
            alone = place.world_size == 1 and config.dtype == "float32"  # mps has no float64
            wanted = "mps" if torch.backends.mps.is_available() and alone else "cpu"
    if wanted == "cuda":
        there = torch.cuda.device_count()
        see_the_same = place.started_by in ("torchrun", "accelerate")  # a task of srun may see its own alone
        if there == 0 or (see_the_same and place.local_world_size > there):
            raise LaunchError(
                f"{place.local_world_size} processes on a machine with {there} CUDA devices. "
                f"Start at most {there}, or set device=cpu."
            )
    if wanted == "mps" and place.world_size > 1:
        raise ConfigError(f"device=mps trains on one process, not on {place.world_size}. Set device=cpu.")
    return wanted


def choose_precision(config: Config, device: str, recorded_precision: str | None = None) -> Precision:
    """YAML wins; the launcher's counts when YAML is silent (`accelerate launch` always exports one).

    `recorded_precision`: that of the run that goes on, which stays. A launcher's `no` is no wish for another.

    Raises:
        ConfigError: not to be had, or another than the run was begun with.
    """
    theirs = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    ours = config.mixed_precision
    if ours not in (None, "no", theirs, recorded_precision) and theirs != "no":
        raise ConfigError(
            f"mixed_precision={ours} in the config, {theirs} from accelerate launch. Leave one of them out."
        )
    precision = ours or (recorded_precision if recorded_precision and theirs == "no" else theirs)
    if recorded_precision and precision != recorded_precision:
        wish = f"mixed_precision={ours}" if ours else f"ACCELERATE_MIXED_PRECISION={theirs}"
        fix = f"Set mixed_precision={recorded_precision}" if ours else "Unset it"
        raise ConfigError(f"{wish}, and the run was begun with {recorded_precision}. {fix}.")
    if precision not in ("no", "bf16", "fp16"):
        raise ConfigError(f"ACCELERATE_MIXED_PRECISION={precision} is not supported: no, bf16 or fp16.")
    if precision == "fp16" and device == "cpu":
        raise ConfigError("mixed_precision=fp16 needs a GPU. On a CPU set bf16 or no.")
    if precision != "no" and config.dtype == "float64":
        raise ConfigError(f"dtype=float64 and mixed_precision={precision} exclude each other. Set one of them.")
    return cast(Precision, precision)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device, or the machine, had no more to give. On a CPU torch says it in words alone."""
    words = ("can't allocate memory", "not enough memory", "out of memory")
    said = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return said or isinstance(error, (MemoryError, torch.OutOfMemoryError))


def is_device_assert(error: BaseException) -> bool:
    """Whether a kernel found an index that there is none of. The steps around it say nothing of which."""
    return isinstance(error, RuntimeError) and "device-side assert" in str(error)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # numbers of mallopt(3)


def keep_freed_memory(environment: Mapping[str, str]) -> None:
    """Tell glibc's malloc, for all of this process, to keep what is freed. The user's own MALLOC_... settings stand.

    It gives tensors of some MiB back to the kernel, which zeroes every page anew: on two cores conv then evaluates in
    2.1 s instead of 1.3.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in environment):
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    # Older glibc takes no more than 2**25. Without the one the other would do harm: it ends malloc's own tuning.
    if set_option is not None and (set_option(_MMAP_THRESHOLD, 2**30) or set_option(_MMAP_THRESHOLD, 2**25)):
        set_option(_TRIM_THRESHOLD, 2**31 - 1)


def peak_memory_gib(device: torch.device) -> float:
    """The most device memory that tensors took, or on a CPU the most resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
