"""The process group: joining it, collectives, leaving it. The only module that uses torch.distributed."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast
from uuid import uuid4

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from dist_train.config.schema import Config, Precision
from dist_train.distributed import shared_memory
from dist_train.distributed.devices import choose_device, choose_precision
from dist_train.distributed.joining import connect, override_accelerate_config, set_up_process
from dist_train.distributed.process_end import keep_alive
from dist_train.distributed.process_info import ProcessInfo, detect_process, export_rendezvous
from dist_train.distributed.shared_memory import SharedMemory
from dist_train.errors import ConfigError, DistTrainError, LaunchError, RunDirError

_log = logging.getLogger(__name__)
T = TypeVar("T")
SHARED_MEMORY = "shared memory"  # as the name of an exchange


@dataclass(frozen=True)
class World:
    """The processes that train together, as seen by one of them."""

    accelerator: Accelerator
    process: ProcessInfo
    mixed_precision: Precision
    num_threads: int
    shared_memory: SharedMemory | None = None  # adds gradients; None: the backend does

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
        override_accelerate_config(os.environ)
        device = choose_device(config, process)
        precision = choose_precision(config, device, recorded_precision)
        threads = set_up_process(config, process, device)
        world = cls(connect(config, process, device, precision), process, precision, threads)
        if device == "cuda":
            world.check_exclusive_device(str(torch.cuda.get_device_properties(world.device).uuid))
        return world

    def with_threads(self, num_threads: int) -> World:
        """Return this world with `num_threads` CPU threads: results of one and two threads differ in their bits."""
        torch.set_num_threads(num_threads)
        return replace(self, num_threads=num_threads)

    def with_shared_memory(self, timeout_s: float) -> World:
        """Return this world with gradients added through shared memory, if all ranks are on CPUs of one host.

        `timeout_s`: how long a rank waits for another, until `set_timeout` is called.

        Collective: every rank must call this.
        """
        if self.size == 1 or self.device.type != "cpu":
            return self
        shared = shared_memory.share_memory(self.rank, self.size, self.gather, timeout_s)
        if isinstance(shared, str):
            _log.info("gradients are added by gloo and not through shared memory: %s", shared)
            return self
        return replace(self, shared_memory=shared)

    @property
    def exchange(self) -> str:
        """What adds the gradients of the ranks; it decides the last bits of a sum of three and more."""
        if self.size == 1:
            return "none"
        return SHARED_MEMORY if self.shared_memory is not None else str(dist.get_backend())

    def exchange_gradients(self, model: nn.Module) -> None:
        """Have `model`, if it is wrapped in DDP, average its gradients through the shared memory of this world."""
        if self.shared_memory is not None and isinstance(model, nn.parallel.DistributedDataParallel):
            # DDP refuses a hook whose annotations are strings.
            model.register_comm_hook(self.shared_memory, lambda memory, bucket: _average_bucket(memory, bucket))

    def set_timeout(self, seconds: float) -> None:
        """Set how long this rank waits for the others in each later collective; then it raises RuntimeError."""
        if self.shared_memory is not None:
            self.shared_memory.timeout_s = seconds
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

    def average(self, values: Tensor) -> Tensor:
        """Return the mean of `values`, contiguous, over the ranks, as DDP averages gradients. In place.

        Collective: every rank must call this.
        """
        if self.shared_memory is not None:
            self.shared_memory.average(values)
        elif self.size > 1:
            self.all_reduce(values.div_(self.size))
        return values

    def slowest(self, seconds: float) -> float:
        """Return the longest time of all ranks.

        Collective: every rank must call this.
        """
        return self.all_reduce(torch.tensor(seconds, device=self.device), "max").item() if self.size > 1 else seconds

    def all_gather(self, values: Tensor) -> Tensor:
        """Return the `values` of all ranks, stacked: [world_size, ...].

        Collective: every rank must call this.
        """
        if self.size == 1:
            return values.unsqueeze(0)
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(gathered, values)
        return torch.stack(gathered)

    def gather_to_rank_zero(self, values: Tensor) -> Tensor | None:
        """Return the `values` of all ranks, stacked: [world_size, ...]; None on the other ranks.

        Collective: every rank must call this.
        """
        if self.size == 1:
            return values.unsqueeze(0)
        gathered = [torch.empty_like(values) for _ in range(self.size)] if self.is_rank_zero else None
        dist.gather(values, gathered, dst=0)
        return None if gathered is None else torch.stack(gathered)

    def gather(self, value: T) -> list[T]:
        """Return the objects (small, picklable) of all ranks.

        Collective: every rank must call this.
        """
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def first_problem(self, problem: str) -> str:
        """Return the `problem` of the first rank that has one, "" if none has.

        Collective: every rank must call this.
        """
        return next(filter(None, self.gather(problem)), "")

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
        if self.size > 1:
            # Not Accelerate's: on a machine with GPUs it names one, also for ranks on the CPU.
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

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
            keep_alive(dist.group.WORLD)
        self.barrier()
        self.accelerator.end_training()


def _average_bucket(memory: SharedMemory, bucket: Any) -> torch.futures.Future[Tensor]:
    gradients = bucket.buffer()
    memory.average(gradients)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(gradients)
    return done


def backends() -> list[str]:
    """Return the communication backends of this build of torch."""
    return [name for name in ("nccl", "gloo") if getattr(dist, f"is_{name}_available")()]
