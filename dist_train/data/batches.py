"""Batches on the device: gathered from a resident set, or streamed by loader workers. The same examples either way."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from dist_train.batching import ShardSampler, evaluation_shard
from dist_train.config import DataConfig, Normalize
from dist_train.data import Examples
from dist_train.data.image_set import ImageSet
from dist_train.distributed import World
from dist_train.errors import UserCodeError
from dist_train.generators import seed_everything
from dist_train.seeding import derive_seed

Key = tuple[int, int]  # (epoch, index): what a loader worker needs to make an example


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Images are [B, C, H, W] of the default dtype and labels int64 [B]; user code may differ."""

    inputs: Any
    targets: Any
    indices: Tensor  # int64 [B]: which examples of the set these are

    def __len__(self) -> int:
        return len(self.indices)


class Batches(Protocol):
    """The training batches of one rank."""

    wait_s: float  # seconds spent waiting for data since the start

    def at(self, step: int, micro_step: int) -> Batch: ...


class Pixels:
    """uint8 pixels to normalised floats, (x / 255 - mean) / std, on the device they are on."""

    def __init__(self, normalize: Normalize | None, device: torch.device) -> None:
        dtype = torch.get_default_dtype()
        mean = torch.tensor(normalize.mean if normalize else [0.0], dtype=torch.float64)
        std = torch.tensor(normalize.std if normalize else [1.0], dtype=torch.float64)
        # One multiplication and one subtraction: a third less memory traffic than the formula as written.
        self.scale = (1 / (255 * std)).to(dtype).view(-1, 1, 1).to(device)
        self.shift = (mean / std).to(dtype).view(-1, 1, 1).to(device)
        self.is_identity = not self.shift.any().item()

    def __call__(self, pixels: Tensor) -> Tensor:  # uint8 [B, C, H, W] -> float [B, C, H, W]
        images = pixels.to(self.scale.dtype).mul_(self.scale)
        return images if self.is_identity else images.sub_(self.shift)


def to_default_dtype(inputs: Any) -> Any:
    """What user code made, with float32 tensors in the run's dtype (float64 is for exactness checks)."""
    if isinstance(inputs, Tensor):
        return inputs.to(torch.get_default_dtype()) if inputs.dtype == torch.float32 else inputs
    if isinstance(inputs, (list, tuple)):
        return type(inputs)(to_default_dtype(item) for item in inputs)
    if isinstance(inputs, dict):
        return {key: to_default_dtype(item) for key, item in inputs.items()}
    return inputs


class ResidentBatches:
    """The whole set lies on the device as uint8; a batch is one gather."""

    wait_s = 0.0

    def __init__(self, examples: ImageSet, sampler: ShardSampler, pixels: Pixels, device: torch.device) -> None:
        self.images, self.labels = examples.images.to(device), examples.labels.to(device)
        self.sampler = sampler.on(device)
        self.pixels = pixels

    def at(self, step: int, micro_step: int) -> Batch:
        (indices,) = draw = self.draw(step, micro_step)
        return Batch(*self.make(*draw), indices)

    def draw(self, step: int, micro_step: int) -> tuple[Tensor]:
        """What decides the micro-batch: the indices of its examples, int64 [B], on the device."""
        size = self.sampler.plan.per_device_batch_size
        return (self.sampler.indices(step)[micro_step * size : (micro_step + 1) * size],)

    def make(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The images [B, C, H, W] and labels [B] at `indices` (int64 [B], on the device). Tensor work alone."""
        return self.pixels(self.images.index_select(0, indices)), self.labels.index_select(0, indices)


class Seeded(Dataset[Any]):
    """Makes each example under seeds from (seed, epoch, index).

    So random transforms of user code give the same example whatever the number of workers and ranks, and after any
    resume.
    """

    def __init__(self, examples: Examples, seed: int) -> None:
        self.examples = examples
        self.seed = seed
        self.draws = not isinstance(examples, ImageSet)

    def __getitem__(self, key: Key) -> tuple[int, Any]:
        epoch, index = key
        if self.draws:
            seed_everything(derive_seed(self.seed, "example", epoch, index))
        return index, self.examples[index]


class _Collate:
    """The data set's own `collate(batch)` inside ours, which keeps the indices beside it."""

    def __init__(self, examples: Examples) -> None:
        self.collate: Callable[[list[Any]], Any] = getattr(examples, "collate", default_collate)

    def __call__(self, items: list[tuple[int, Any]]) -> tuple[Any, Any, Tensor]:
        made = self.collate([item for _, item in items])
        if not isinstance(made, (tuple, list)) or len(made) != 2:
            raise UserCodeError(
                f"A batch must be two things, (inputs, targets); found {_kind_of(made)}. Make each example a pair, or "
                f"give the data set a method collate(batch) that returns one."
            )
        return made[0], made[1], torch.tensor([index for index, _ in items])


def _kind_of(made: Any) -> str:
    return f"{len(made)} in a {type(made).__name__}" if isinstance(made, (tuple, list)) else type(made).__name__


class StreamingBatches:
    """Batches made by loader workers, fetched ahead in the order of the steps.

    `at` may be asked again for the batch it gave last (the warm-up does); any other jump starts a new loader there.
    """

    def __init__(
        self,
        examples: Examples,
        sampler: ShardSampler,
        pixels: Pixels | None,
        device: torch.device,
        num_workers: int,
        seed: int,
    ) -> None:
        self.wait_s = 0.0
        self._sampler = sampler
        self._place = _Place(pixels, device)
        self._dataset = Seeded(examples, seed)
        self._loader = _loader_settings(examples, num_workers, device)
        self._stream: Iterator[Any] = iter(())
        self._last: tuple[tuple[int, int], Batch] | None = None
        self._next: tuple[int, int] | None = None

    def at(self, step: int, micro_step: int) -> Batch:
        wanted = (step, micro_step)
        if self._last is not None and self._last[0] == wanted:
            return self._last[1]
        started = time.perf_counter()
        if self._next != wanted:
            keys = _keys(self._sampler, step, micro_step)
            self._stream = _stream(DataLoader(self._dataset, batch_sampler=keys, **self._loader))
        batch = self._place(next(self._stream))
        self.wait_s += time.perf_counter() - started
        last_micro_step = micro_step + 1 == self._sampler.plan.grad_accum_steps
        self._next = (step + 1, 0) if last_micro_step else (step, micro_step + 1)
        self._last = wanted, batch
        return batch


def _keys(sampler: ShardSampler, step: int, micro_step: int) -> Iterator[list[Key]]:
    """The keys of every micro-batch from here on, without end.

    No method of the batches: the loader that reads it would be part of a cycle, and its workers would live on until
    the garbage collector finds it, which then waits 5 s for each of them.
    """
    size = sampler.plan.per_device_batch_size
    while True:
        epoch = step // sampler.steps_per_epoch
        for start in range(micro_step * size, sampler.plan.share, size):
            yield [(epoch, index) for index in sampler.indices(step)[start : start + size].tolist()]
        step, micro_step = step + 1, 0


class EvaluationBatches:
    """One rank's shard of a split, once over. Every rank has `num_batches`, the last of them may be empty."""

    def __init__(
        self,
        examples: Examples,
        shard: Tensor,
        batch_size: int,
        num_batches: int,
        resident: bool,
        pixels: Pixels | None,
        device: torch.device,
        num_workers: int,
        seed: int,
    ) -> None:
        self.num_examples = len(examples)  # type: ignore[arg-type]  # of the whole split
        self.num_batches = num_batches
        self._chunks = torch.split(shard, batch_size) if len(shard) else ()
        self._examples = examples
        self._place = _Place(pixels, device)
        self._seed = seed
        self._resident = None
        if resident and isinstance(examples, ImageSet):
            self._resident = examples.images.to(device), examples.labels.to(device)
        self._settings = _loader_settings(examples, num_workers, device)

    def __iter__(self) -> Iterator[Batch]:
        if self._resident is None:
            keys = [[(0, index) for index in chunk.tolist()] for chunk in self._chunks]
            dataset = Seeded(self._examples, derive_seed(self._seed, "evaluation"))
            yield from map(self._place, _stream(DataLoader(dataset, batch_sampler=keys, **self._settings)))
            return
        images, labels = self._resident
        for chunk in self._chunks:
            here = chunk.to(images.device)
            yield self._place((images.index_select(0, here), labels.index_select(0, here), chunk))

    def seed_of(self, batch: Batch) -> int:
        """For nets that draw in evaluation too (a VAE, dropout kept on): the same after any resume."""
        return derive_seed(self._seed, "evaluation forward", int(batch.indices[0]))


class _Place:
    """What a loader made, moved to the device and, if it is pixels, normalised there."""

    def __init__(self, pixels: Pixels | None, device: torch.device) -> None:
        self.pixels = pixels
        self.device = device

    def __call__(self, made: tuple[Any, Any, Tensor]) -> Batch:
        inputs, targets, indices = made
        inputs, targets = send_to_device((inputs, targets), self.device, non_blocking=True)
        return Batch(self.pixels(inputs) if self.pixels else to_default_dtype(inputs), targets, indices)


# What stops a run is sent to whole process groups (torchrun) or jobs (Slurm), and so to the loader workers too.
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def _stream(loader: DataLoader[Any]) -> Iterator[Any]:
    """Iterate, with workers that only their parent can stop: the ranks agree on a stop and need batches until then.

    Blocked while the workers are forked, the signals are so in them from their first moment on.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _heed_only_the_parent(_worker: int) -> None:
    """In a worker: TERM from the parent, which ends workers so, ends it; the blocked signals of others do not."""
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return

    def wait() -> None:
        while True:
            told = signal.sigwaitinfo(_STOP_SIGNALS)
            if told.si_signo == signal.SIGTERM and told.si_pid == os.getppid():
                os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _loader_settings(examples: Examples, num_workers: int, device: torch.device) -> dict[str, Any]:
    return {
        "num_workers": num_workers,
        "collate_fn": _Collate(examples),
        "worker_init_fn": _heed_only_the_parent,
        "pin_memory": device.type == "cuda",
        "prefetch_factor": 4 if num_workers else None,
    }


def training_batches(
    examples: Examples, sampler: ShardSampler, config: DataConfig, device: torch.device, seed: int
) -> Batches:
    """Resident or streaming; the same batches bit for bit."""
    pixels = Pixels(config.normalize, device) if yields_pixels(examples) else None
    if isinstance(examples, ImageSet) and pixels and is_resident(examples, config, device):
        return ResidentBatches(examples, sampler, pixels, device)
    return StreamingBatches(examples, sampler, pixels, device, config.num_workers, seed)


def evaluation_batches(
    examples: Examples, batch_size: int, world: World, config: DataConfig, seed: int
) -> EvaluationBatches:
    """This rank's shard of a split."""
    num_examples = len(examples)  # type: ignore[arg-type]
    largest_shard = -(-num_examples // world.size)
    device = world.device
    return EvaluationBatches(
        examples,
        evaluation_shard(num_examples, world.rank, world.size),
        batch_size=batch_size,
        num_batches=-(-largest_shard // batch_size),
        resident=isinstance(examples, ImageSet) and is_resident(examples, config, device),
        pixels=Pixels(config.normalize, device) if yields_pixels(examples) else None,
        device=device,
        num_workers=config.num_workers,
        seed=seed,
    )


def is_resident(examples: ImageSet, config: DataConfig, device: torch.device) -> bool:
    """As `data.resident` says, else if the set takes at most half of the free device memory. On a CPU it is in memory
    already."""
    if config.resident is not None or device.type != "cuda":
        return config.resident is not False
    free, _total = torch.cuda.mem_get_info(device)
    return examples.images.nbytes <= free // 2


def yields_pixels(examples: Examples) -> bool:
    """Sets of ours give uint8 pixels, to be normalised on the device; user code gives what its transforms make."""
    return isinstance(examples, ImageSet) or getattr(examples, "yields_pixels", False)
