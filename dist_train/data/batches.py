"""Training batches on the device: gathered from a resident set, or streamed by loader workers. The same either way."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_train.config.schema import DataConfig
from dist_train.data.loader import ExampleKey, LoadedBatch, loader_of, stream
from dist_train.data.sampler import ShardSampler
from dist_train.data.sets.image_set import Examples, ImageSet, yields_pixels
from dist_train.data.transforms import Augment, Pixels, change_each, to_default_dtype

Position = tuple[int, int]  # (step, micro-step)


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Images are [B, C, H, W] of the default dtype and labels int64 [B]; user code may differ."""

    inputs: Any
    targets: Any
    indices: Tensor  # int64 [B]: which examples of the set these are
    labels: Tensor | None = None  # the targets as the host has them, where they are on another device

    def __len__(self) -> int:
        return len(self.indices)


class Batches(Protocol):
    """The training batches of one rank."""

    examples: Examples  # that they are made of
    wait_s: float  # seconds spent waiting for data since the start
    on_gather: Callable[[Tensor], object]  # told the indices of each batch that is handed out

    def at(self, step: int, micro_step: int) -> Batch: ...


class ResidentBatches:
    """The whole set lies on the device as uint8; a batch is one gather."""

    wait_s = 0.0

    def __init__(
        self, examples: ImageSet, sampler: ShardSampler, pixels: Pixels, augment: Augment | None, device: torch.device
    ) -> None:
        self.examples: Examples = examples
        self.images, self.labels = examples.images.to(device), examples.labels.to(device)
        self.sampler = sampler.on(device)
        self.pixels = pixels
        self.augment = augment
        self.on_gather: Callable[[Tensor], object] = _ignore

    def at(self, step: int, micro_step: int) -> Batch:
        draw = self.select(step, micro_step)
        return Batch(*self.materialise(*draw), draw[0])

    def select(self, step: int, micro_step: int) -> tuple[Tensor, ...]:
        """What decides the micro-batch, on the device: the indices of its examples, int64 [B], and their shifts."""
        size = self.sampler.plan.per_device_batch_size
        indices = self.sampler.indices(step)[micro_step * size : (micro_step + 1) * size]
        self.on_gather(indices)
        return (indices, *self.augment.draw(step, micro_step)) if self.augment else (indices,)

    def materialise(self, indices: Tensor, *shifts: Tensor) -> tuple[Tensor, Tensor]:
        """The images [B, C, H, W] and labels [B] that `select` decided on. Tensor work alone."""
        images = self.images.index_select(0, indices)
        if self.augment is not None:
            images = self.augment(images, *shifts)
        return self.pixels(images), self.labels.index_select(0, indices)


class PerturbedBatches:
    """Resident batches whose pixels are each off by at most `by`, as a part of itself."""

    wait_s = 0.0

    def __init__(self, exact: Batches, by: float) -> None:
        self.examples = exact.examples
        self.on_gather: Callable[[Tensor], object] = _ignore
        self._exact, self._by = exact, by

    def at(self, step: int, micro_step: int) -> Batch:
        batch = self._exact.at(step, micro_step)
        generator = torch.Generator(batch.inputs.device).manual_seed(step)
        noise = torch.empty_like(batch.inputs).uniform_(-self._by, self._by, generator=generator)
        return Batch(batch.inputs * (1 + noise), batch.targets, batch.indices)


class StreamingBatches:
    """Batches made by loader workers, fetched ahead in the order of the steps.

    `at` may be asked again for the batch it gave last (the warm-up does); any other jump starts a new loader there.
    """

    def __init__(
        self,
        examples: Examples,
        sampler: ShardSampler,
        pixels: Pixels | None,
        augment: Augment | None,
        device: torch.device,
        num_workers: int,
        seed: int,
    ) -> None:
        self.examples = examples
        self.wait_s = 0.0
        self.on_gather: Callable[[Tensor], object] = _ignore
        self._sampler = sampler
        self._augment = augment
        self._place = ToDevice(pixels, device)
        self._open = partial(loader_of, examples, num_workers=num_workers, device=device, seed=seed)
        self._stream: Iterator[LoadedBatch] = iter(())
        self._last: tuple[Position, Batch] | None = None
        self._next: Position | None = None  # what comes out of `_ready`, then out of the stream
        self._ready: deque[Batch] = deque()
        # On a GPU the next batch is copied and normalised beside the work on this one.
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def at(self, step: int, micro_step: int) -> Batch:
        wanted = (step, micro_step)
        if self._last is not None and self._last[0] == wanted:
            self.on_gather(self._last[1].indices)
            return self._last[1]
        started = time.perf_counter()
        if self._next != wanted:
            self._ready.clear()
            self._stream = stream(self._open(_keys(self._sampler, *wanted)))
        if not self._ready:
            self._ready.append(self._fetch(wanted))
        batch = self._ready.popleft()
        self._next = self._after(wanted)
        if self._side is not None:
            _hand_over(batch, self._side)
            self._ready.append(self._fetch(self._next))
        self.wait_s += time.perf_counter() - started
        self._last = wanted, batch
        self.on_gather(batch.indices)
        return batch

    def _fetch(self, place: Position) -> Batch:
        made = next(self._stream)
        with torch.cuda.stream(self._side):  # None: nothing changes
            shifts = self._augment.draw(*place) if self._augment else ()
            return self._place(made, lambda images: self._augment(images, *shifts) if self._augment else images)

    def _after(self, place: Position) -> Position:
        step, micro_step = place
        last = micro_step + 1 == self._sampler.plan.grad_accum_steps
        return (step + 1, 0) if last else (step, micro_step + 1)


def _ignore(_indices: Tensor) -> None:
    """Nobody listens yet."""


def _hand_over(batch: Batch, side: torch.cuda.Stream) -> None:
    """From the stream it was made on to the one that trains, which must wait for it and holds its memory."""
    here = torch.cuda.current_stream(side.device)
    here.wait_stream(side)
    change_each(partial(_record, here), (batch.inputs, batch.targets))


def _record(stream: torch.cuda.Stream, item: Any) -> Any:
    if isinstance(item, Tensor):
        item.record_stream(stream)
    return item


def _keys(sampler: ShardSampler, step: int, micro_step: int) -> Iterator[list[ExampleKey]]:
    """The keys of every micro-batch from here on, without end.

    No method of the batches: the loader that reads it would be part of a cycle, and its workers would live on until
    the garbage collector finds it, which then waits 5 s for each of them.
    """
    size = sampler.plan.per_device_batch_size
    while True:
        epoch = step // sampler.steps_per_epoch
        for start in range(micro_step * size, sampler.plan.per_rank_batch_size, size):
            yield [(epoch, index) for index in sampler.indices(step)[start : start + size].tolist()]
        step, micro_step = step + 1, 0


class ToDevice:
    """What a loader made, moved to the device and, if it is pixels, made into images there."""

    def __init__(self, pixels: Pixels | None, device: torch.device) -> None:
        self.pixels = pixels
        self.device = device

    def __call__(self, made: LoadedBatch, change: Callable[[Tensor], Tensor] = lambda images: images) -> Batch:
        inputs, targets, indices = made
        labels = None
        if self.device.type != "cpu":
            labels = targets if isinstance(targets, Tensor) and targets.device.type == "cpu" else None
            inputs, targets = change_each(self._move, (inputs, targets))
        return Batch(self.pixels(change(inputs)) if self.pixels else to_default_dtype(inputs), targets, indices, labels)

    def _move(self, item: Any) -> Any:
        return item.to(self.device, non_blocking=True) if isinstance(item, Tensor) else item.to(self.device)


def training_batches(
    examples: Examples, sampler: ShardSampler, config: DataConfig, device: torch.device, seed: int
) -> Batches:
    """Resident or streaming; the same batches bit for bit."""
    pixels = Pixels(config.normalize, device) if yields_pixels(examples) else None
    augment = Augment(config.augment, sampler.plan, sampler.rank, seed, device) if config.augment else None
    if isinstance(examples, ImageSet) and pixels and is_resident(examples, config, device):
        return ResidentBatches(examples, sampler, pixels, augment, device)
    return StreamingBatches(examples, sampler, pixels, augment, device, config.num_workers, seed)


def is_resident(examples: ImageSet, config: DataConfig, device: torch.device) -> bool:
    """As `data.resident` says, else if the set takes at most half of the free device memory. On a CPU it is in memory
    already."""
    if config.resident is not None or device.type != "cuda":
        return config.resident is not False
    free, _total = torch.cuda.mem_get_info(device)
    return examples.images.nbytes <= free // 2
