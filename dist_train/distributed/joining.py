"""What a process does to become a rank: it sets itself up, and connects to the others through Accelerate."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import MutableMapping
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from dist_train.config.schema import Config, Precision
from dist_train.distributed.devices import keep_freed_memory
from dist_train.distributed.peer_failures import first_line, is_timeout
from dist_train.distributed.process_info import ProcessInfo, threads_per_process
from dist_train.errors import LaunchError

_log = logging.getLogger(__name__)


def override_accelerate_config(env: MutableMapping[str, str]) -> None:
    """Reject or override what an accelerate config file of the user would change silently.

    Raises:
        LaunchError: it asks for something else than DDP.
    """
    unsupported = [
        name for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")
        if env.get(name, "false").lower() in ("true", "1")
    ]  # fmt: skip
    if unsupported:
        raise LaunchError(
            f"{', '.join(unsupported)} is set, by an accelerate config file: dist_train supports only DDP. "
            f"Use launch/accelerate.sh, which uses a config file of this project."
        )
    env["ACCELERATE_DYNAMO_BACKEND"] = "NO"  # a compiled model would prefix the names of its weights
    env["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = "1"  # another value would divide the loss a second time


def set_up_process(config: Config, process: ProcessInfo, device: str) -> int:
    """Set threads, memory, device index and default dtype of this process. Return the number of threads."""
    threads = threads_per_process(process.local_world_size, os.environ)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # Accelerate would choose one and warn
    torch.set_num_threads(threads)
    if device == "cpu":
        keep_freed_memory(os.environ)
    if device == "cuda" and process.world_size > 1:
        # Accelerate uses it as the device index, which is 0 for a task that sees only its own device.
        os.environ["LOCAL_RANK"] = str(process.local_rank % torch.cuda.device_count())
    if config.tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
    torch.set_default_dtype(getattr(torch, config.dtype))
    return threads


def connect(config: Config, process: ProcessInfo, device: str, precision: Precision) -> Accelerator:
    """Meet the other ranks, for at most setup_timeout_s.

    Collective: every rank must call this.

    Raises:
        LaunchError: missing ranks, or an unexpected rank or world size.
    """
    handlers = [
        DistributedDataParallelKwargs(
            find_unused_parameters=config.ddp.find_unused_parameters, gradient_as_bucket_view=True
        ),
        InitProcessGroupKwargs(timeout=timedelta(seconds=config.setup_timeout_s)),
    ]
    if process.world_size > process.local_world_size:
        _log.info("waiting for %d processes to connect to %s", process.world_size, os.environ.get("MASTER_ADDR"))
    try:
        # Without cpu=True, Accelerator() under torchrun on a machine without accelerator makes N worlds of one.
        accelerator = Accelerator(
            cpu=device == "cpu",
            mixed_precision=precision,
            gradient_accumulation_steps=1,  # the training step accumulates by itself
            kwargs_handlers=handlers,
        )
    except (RuntimeError, ValueError) as error:  # torch.distributed's errors are RuntimeErrors
        raise _not_connected(error, config, process) from error
    if (accelerator.process_index, accelerator.num_processes) != (process.rank, process.world_size):
        raise LaunchError(
            f"Expected rank {process.rank} of {process.world_size} (started by {process.started_by}), got rank "
            f"{accelerator.process_index} of {accelerator.num_processes}. Start with dist-train launch --nproc "
            f"{process.world_size}."
        )
    return accelerator


def _not_connected(error: Exception, config: Config, process: ProcessInfo) -> LaunchError:
    port = os.environ.get("MASTER_PORT")
    why = first_line(error)
    if "EADDRINUSE" in str(error):
        why = f"MASTER_PORT={port} is in use on {socket.gethostname()}. Unset it, or set another for this job."
    elif is_timeout(error):
        why += f" If a rank takes longer to start, raise setup_timeout_s={config.setup_timeout_s:g}."
    return LaunchError(
        f"Rank {process.rank} of {process.world_size} could not connect to the other ranks at "
        f"{os.environ.get('MASTER_ADDR')}:{port}: {why}"
    )
