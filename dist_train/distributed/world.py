"""The process group: joining it, collectives, leaving it. The only module that uses torch.distributed."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast
from uuid import uuid4

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor

from dist_train.config.schema import Config, Precision
from dist_train.distributed.devices import choose_device, choose_precision, keep_freed_memory
from dist_train.distributed.peer_failures import first_line, is_timeout
from dist_train.distributed.process import ProcessInfo, detect_process, export_rendezvous, threads_per_process
from dist_train.errors import ConfigError, DistTrainError, LaunchError, RunDirError

T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class World:
    """The processes that train together, as seen by one of them."""

    accelerator: Accelerator
    process: ProcessInfo
    mixed_precision: Precision
    num_threads: int

    @property
    def rank(self) -> int:
        return self.process.rank

    @property
    def size(self) -> int:
        return self.process.world_size

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return self.accelerator.device  # type: ignore[no-any-return]

    @classmethod
    def join(cls, config: Config, recorded_precision: str | None = None) -> World:
        """Form the process group. Until `set_timeout` is called, ranks wait setup_timeout_s for each other.

        `recorded_precision`: the precision of a run that resumes.

        Collective: every rank must call this.

        Raises:
            LaunchError: a partial launcher environment, an unexpected rank or world size, or missing ranks.
            ConfigError: a device or precision that is not available.
        """
        process = detect_process(os.environ)
        export_rendezvous(process, os.environ)
        _check_accelerate(os.environ)
        device = choose_device(config, process)
        precision = choose_precision(config, device, recorded_precision)
        threads = threads_per_process(process.local_world_size, os.environ)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # Accelerate would choose one and warn
        torch.set_num_threads(threads)
        if device == "cpu":
            keep_freed_memory(os.environ)
        if device == "cuda" and process.world_size > 1:
            # Accelerate uses it as the device index, which is 0 for a task that sees only its own device.
            os.environ["LOCAL_RANK"] = str(process.local_rank % torch.cuda.device_count())
        torch.set_default_dtype(getattr(torch, config.dtype))

        timeout = timedelta(seconds=config.setup_timeout_s)
        handlers = [
            DistributedDataParallelKwargs(
                find_unused_parameters=config.ddp.find_unused_parameters, gradient_as_bucket_view=True
            ),
            InitProcessGroupKwargs(timeout=timeout),
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
        except (RuntimeError, ValueError, dist.DistError) as error:
            port = os.environ.get("MASTER_PORT")
            why = first_line(error)
            if "EADDRINUSE" in str(error):
                why = f"MASTER_PORT={port} is in use on {socket.gethostname()}. Unset it, or set another for this job."
            elif is_timeout(error):
                why += f" If a rank takes longer to start, raise setup_timeout_s={config.setup_timeout_s:g}."
            raise LaunchError(
                f"Rank {process.rank} of {process.world_size} could not connect to the other ranks at "
                f"{os.environ.get('MASTER_ADDR')}:{port}: {why}"
            ) from error
        if (accelerator.process_index, accelerator.num_processes) != (process.rank, process.world_size):
            raise LaunchError(
                f"Expected rank {process.rank} of {process.world_size} (started by {process.started_by}), got rank "
                f"{accelerator.process_index} of {accelerator.num_processes}. Start with dist-train launch --nproc "
                f"{process.world_size}."
            )
        world = cls(accelerator, process, precision, threads)
        if device == "cuda":
            world.check_exclusive_device(str(torch.cuda.get_device_properties(world.device).uuid))
        return world

    def with_threads(self, num_threads: int) -> World:
        """Return this world with `num_threads` CPU threads: results of one and two threads differ in their bits."""
        torch.set_num_threads(num_threads)
        return replace(self, num_threads=num_threads)

    def set_timeout(self, seconds: float) -> None:
        """Set how long this rank waits for the others in each later collective; then it raises RuntimeError."""
        if self.size > 1:
            assert dist.group.WORLD is not None
            dist.group.WORLD.set_timeout(timedelta(seconds=seconds))

    # --- collectives ---------------------------------------------------------------------------------------------

    def all_reduce(self, values: Tensor, op: str = "sum") -> Tensor:
        """Return the element-wise sum (or max) of `values` over the ranks, on every rank. In place.

        Collective: every rank must call this.
        """
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
        return values

    def all_gather(self, values: Tensor) -> Tensor:
        """Return the `values` of all ranks, stacked: [world_size, ...].

        Collective: every rank must call this.
        """
        if self.size == 1:
            return values.unsqueeze(0)
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(gathered, values)
        return torch.stack(gathered)

    def gather(self, value: T) -> list[T]:
        """Return the objects (small, picklable) of all ranks.

        Collective: every rank must call this.
        """
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def hosts(self) -> list[str]:
        """Return the host names of all ranks.

        Collective: every rank must call this.
        """
        return self.gather(socket.gethostname())

    def broadcast(self, values: list[Tensor]) -> None:
        """Copy rank zero's tensors to every rank. In place.

        Collective: every rank must call this.
        """
        if self.size > 1:
            for value in values:
                dist.broadcast(value, src=0)

    def from_rank_zero(self, value: T) -> T:
        """Return rank zero's object (small, picklable) on every rank.

        Collective: every rank must call this.
        """
        box: list[Any] = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]  # type: ignore[no-any-return]

    def on_rank_zero(self, action: Callable[[], T]) -> T:
        """Run `action` on rank zero; return its result, or raise its error, on every rank.

        Collective: every rank must call this.

        Raises:
            DistTrainError: on every rank, if `action` raised it on rank zero.
        """
        result: T | DistTrainError | None = None
        if self.is_rank_zero:
            try:
                result = action()
            except DistTrainError as error:
                result = error
        result = self.from_rank_zero(result)
        if isinstance(result, DistTrainError):
            raise result
        return cast(T, result)

    def barrier(self) -> None:
        """Wait for all ranks.

        Collective: every rank must call this.
        """
        self.accelerator.wait_for_everyone()

    def check_shared(self, folder: Path) -> None:
        """Check that every rank sees the folder that rank zero writes to.

        Collective: every rank must call this.

        Raises:
            RunDirError: on every rank, with the number of ranks that do not see it.
        """
        token = folder / f".token_{self.from_rank_zero(uuid4().hex)}"
        if self.is_rank_zero:
            token.touch()
        self.barrier()
        missing = self.all_reduce(torch.tensor(float(not token.exists()), device=self.device)).item()
        if self.is_rank_zero:
            token.unlink(missing_ok=True)
        if missing:
            raise RunDirError(
                f"{int(missing)} of {self.size} ranks do not see the run directory {folder} that rank 0 writes to "
                f"(this is rank {self.rank} on {socket.gethostname()}). Put runs_dir on a file system that all nodes "
                f"share."
            )

    def check_same(self, what: str, value: str) -> None:
        """Check that all ranks have the same `value`; `what` names it in the error.

        Collective: every rank must call this.

        Raises:
            ConfigError: on the ranks that differ from rank zero.
        """
        if value != self.from_rank_zero(value):
            raise ConfigError(f"Rank {self.rank} on {socket.gethostname()} has another {what} than rank 0.")

    def check_exclusive_device(self, device: str) -> None:
        """Check that no other rank uses `device`, an id that is unique on its host.

        It uses the store, since NCCL does not start with two ranks on one device.

        Collective: every rank must call this.

        Raises:
            LaunchError: on every rank, naming two ranks that share a device.
        """
        if self.size == 1:
            return
        store = dist.distributed_c10d._get_default_store()
        store.set(f"device_{self.rank}", f"{device} on {socket.gethostname()}")
        ranks: dict[str, int] = {}
        for rank, name in enumerate(store.multi_get([f"device_{rank}" for rank in range(self.size)])):
            first = ranks.setdefault(name.decode(), rank)
            if first != rank:
                raise LaunchError(
                    f"Ranks {first} and {rank} share the device {name.decode()}. Start one process per device "
                    f"(under srun: --gpus-per-task=1), or set device=cpu."
                )

    def synchronize(self) -> None:
        """Wait until the device has finished all queued work, for exact timing."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def leave(self) -> None:
        """Leave the group together: without the barrier some ranks abort at exit. Call `end_process` soon afterwards.

        Collective: every rank must call this.
        """
        if dist.is_initialized():
            _kept_alive.append(dist.group.WORLD)
        self.barrier()
        self.accelerator.end_training()


# gloo's destructor joins its threads while it holds the GIL, for which one of them may still wait: in 3 of about 250
# finished trainings a rank hung there for ever. So no group is destroyed before its process ends.
_kept_alive: list[Any] = []


def end_process(code: int) -> NoReturn:
    """End this process without the interpreter's clean-up, which would destroy the process group (see above)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def backends() -> list[str]:
    """Return the communication backends of this build of torch."""
    return [name for name in ("nccl", "gloo") if getattr(dist, f"is_{name}_available")()]


def _check_accelerate(env: MutableMapping[str, str]) -> None:
    """Reject or override what an accelerate config file of the user would change silently."""
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
