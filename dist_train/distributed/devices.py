"""Device, precision and memory of one rank."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch

from dist_train.config.schema import Config, Precision
from dist_train.distributed.gpu_driver import not_available
from dist_train.distributed.process_info import ProcessInfo
from dist_train.errors import ConfigError, LaunchError


def choose_device(config: Config, process: ProcessInfo) -> str:
    """Return the device type; `auto` is cuda if available, else mps for a single process, else cpu.

    Raises:
        LaunchError: more processes than CUDA devices on this machine.
        ConfigError: no such device on this machine, or mps with several processes.
    """
    wanted = config.device
    if wanted == "auto":
        if torch.cuda.is_available():
            wanted = "cuda"
        else:
            fits_mps = process.world_size == 1 and config.dtype == "float32"  # mps has no float64
            wanted = "mps" if torch.backends.mps.is_available() and fits_mps else "cpu"
    if wanted == "cuda":
        available = torch.cuda.device_count()
        if available == 0:
            built_for_cpus = torch.version.cuda is None and torch.version.hip is None
            raise not_available("cuda", f"torch {torch.__version__} is built without CUDA" if built_for_cpus else "")
        share_devices = process.started_by in ("torchrun", "accelerate")  # a task of srun may see only its own
        if share_devices and process.local_world_size > available:
            raise LaunchError(
                f"{process.local_world_size} processes on a machine with {available} CUDA devices. "
                f"Start at most {available}, or set device=cpu."
            )
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise not_available("mps")
    if wanted == "mps" and process.world_size > 1:
        raise ConfigError(f"device=mps supports one process, not {process.world_size}. Set device=cpu.")
    return wanted


@contextmanager
def default_dtype(config: Config) -> Iterator[None]:
    """Build what is in this block in the run's dtype, as its ranks do, and leave the process as it was."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, config.dtype))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def choose_precision(config: Config, device: str, recorded_precision: str | None = None) -> Precision:
    """Return the precision of the config, else of the launcher (`accelerate launch` always exports one).

    `recorded_precision`: the precision of a run that resumes. It stays; a launcher's `no` does not contradict it.

    Raises:
        ConfigError: the precision is unsupported, ambiguous, or not that of the run.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    configured = config.mixed_precision
    if configured not in (None, "no", launched, recorded_precision) and launched != "no":
        raise ConfigError(
            f"mixed_precision={configured} in the config, {launched} from accelerate launch. Leave one of them out."
        )
    precision = configured or (recorded_precision if recorded_precision and launched == "no" else launched)
    if recorded_precision and precision != recorded_precision:
        requested = f"mixed_precision={configured}" if configured else f"ACCELERATE_MIXED_PRECISION={launched}"
        fix = f"Set mixed_precision={recorded_precision}" if configured else "Unset it"
        raise ConfigError(f"{requested}, but the run started with {recorded_precision}. {fix}.")
    if precision not in ("no", "bf16", "fp16"):
        raise ConfigError(f"ACCELERATE_MIXED_PRECISION={precision} is not supported. Use no, bf16 or fp16.")
    if precision == "fp16" and device == "cpu":
        raise ConfigError("mixed_precision=fp16 needs a GPU. On a CPU set bf16 or no.")
    if precision != "no" and config.dtype == "float64":
        raise ConfigError(f"dtype=float64 and mixed_precision={precision} exclude each other. Set one of them.")
    return cast(Precision, precision)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the device or the machine was out of memory. On a CPU only torch's message tells."""
    phrases = ("can't allocate memory", "not enough memory", "out of memory")
    by_message = isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in phrases)
    return by_message or isinstance(error, (MemoryError, torch.OutOfMemoryError))


def is_device_assert(error: BaseException) -> bool:
    """Return whether a CUDA kernel met an index out of range. The error does not tell which step or index."""
    return isinstance(error, RuntimeError) and "device-side assert" in str(error)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # option numbers of mallopt(3)


def keep_freed_memory(environment: Mapping[str, str]) -> None:
    """Make glibc's malloc keep freed memory in this process, unless the user sets a MALLOC_... variable.

    By default it returns tensors of several MiB to the kernel, which zeroes every page again: on two cores conv then
    evaluates in 2.1 s instead of 1.3 s.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in environment):
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # absent in musl
    # Older glibc accepts at most 2**25. The trim threshold alone would do harm: it disables malloc's own tuning.
    if set_option is not None and (set_option(_MMAP_THRESHOLD, 2**30) or set_option(_MMAP_THRESHOLD, 2**25)):
        set_option(_TRIM_THRESHOLD, 2**31 - 1)


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak device memory of tensors, or on a CPU the peak resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
