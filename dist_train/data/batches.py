"""Training batches on the device, gathered from a resident set or streamed by loader workers, with equal results."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_train.config.data import DataConfig
from dist_train.data.augment import Augment
from dist_train.data.loader import ExampleKey, LoadedBatch, make_loader, stream
from dist_train.data.picture_transforms import transformed
from dist_train.data.resident_set import tensors_of
from dist_train.data.sampler import ShardSampler
from dist_train.data.sets.image_set import Examples, yields_pixels
from dist_train.data.transforms import Pixels, change_each, to_default_dtype

Position = tuple[int, int]  # (step, micro-step)


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Images are [B, C, H, W] in the default dtype, labels int64 [B] or `Mixed`; user code may
    differ."""

    inputs: Any
    targets: Any
    indices: Tensor  # int64 [B]: positions of the examples in the set
    labels: Tensor | None = None  # host copy of the targets, if the device is not the CPU

    def __len__(self) -> int:
        return len(self.indices)


class Batches(Protocol):
    """The training batches of one rank."""

    examples: Examples  # the source of the batches
    wait_s: float  # seconds spent waiting for data since the start
    on_gather: Callable[[Tensor], object]  # called with the indices of each returned batch

    def at(self, step: int, micro_step: int) -> Batch: ...


class ResidentBatches:
    """Batches of a set that is on the device, pixels as uint8: each is one gather."""

    wait_s = 0.0

    def __init__(
        self,
        examples: Examples,
        sampler: ShardSampler,
        pixels: Pixels | None,
        augment: Augment | None,
        device: torch.device,
    ) -> None:
        tensors = tensors_of(examples)
        assert tensors is not None
        self.examples = examples
        self.inputs, self.targets = (each.to(device) for each in tensors)  # [N, ...] each
        self.sampler = sampler.on(device)
        self.pixels = pixels
        self.augment = augment
        self.on_gather: Callable[[Tensor], object] = _no_listener

    def at(self, step: int, micro_step: int) -> Batch:
        draw = self.select(step, micro_step)
        return Batch(*self.materialise(*draw), self._own(draw[0]))

    def select(self, step: int, micro_step: int) -> tuple[Tensor, ...]:
        """Return what defines the micro-batch, on the device: example indices, int64 [M], and their changes."""
        indices = self.sampler.at(step, _positions(self.sampler, self.augment, micro_step))
        self.on_gather(self._own(indices))
        return (indices, *self.augment.draw(step, micro_step)) if self.augment else (indices,)

    def materialise(self, indices: Tensor, *drawn: Tensor) -> tuple[Tensor, Any]:
        """Return the inputs [B, ...] and targets [B, ...] that `select` chose. Runs tensor operations only."""
        inputs, targets = self.inputs.index_select(0, indices), self.targets.index_select(0, indices)
        return self.augment(inputs, targets, *drawn) if self.augment else (_to_inputs(inputs, self.pixels), targets)

    def _own(self, indices: Tensor) -> Tensor:
        """Return the examples of the micro-batch itself, int64 [B]: others are mixed into them."""
        return indices[: self.sampler.plan.per_device_batch_size]


class PerturbedBatches:
    """Resident batches whose pixels each have a relative error of at most `by`."""

    wait_s = 0.0

    def __init__(self, exact: Batches, by: float) -> None:
        self.examples = exact.examples
        self.on_gather: Callable[[Tensor], object] = _no_listener
        self._exact, self._by = exact, by

    def at(self, step: int, micro_step: int) -> Batch:
        batch = self._exact.at(step, micro_step)
        generator = torch.Generator(batch.inputs.device).manual_seed(step)
        noise = torch.empty_like(batch.inputs).uniform_(-self._by, self._by, generator=generator)
        return Batch(batch.inputs * (1 + noise), batch.targets, batch.indices)


class StreamingBatches:
    """Batches made by loader workers and prefetched in step order.

    `at` may return its last batch again (the warm-up needs this); any other jump starts a new loader at that position.
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
        self.on_gather: Callable[[Tensor], object] = _no_listener
        self._sampler = sampler
        self._augment = augment
        self._to_device = ToDevice(pixels, device)
        self._open_loader = partial(make_loader, examples, num_workers=num_workers, device=device, seed=seed)
        self._loaded: Iterator[LoadedBatch] = iter(())
        self._last: tuple[Position, Batch] | None = None
        self._next: Position | None = None  # position of the next batch in `_ready`, then in the stream
        self._ready: deque[Batch] = deque()
        # On a GPU the next batch is copied and normalised while the current one is computed.
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def at(self, step: int, micro_step: int) -> Batch:
        wanted = (step, micro_step)
        if self._last is not None and self._last[0] == wanted:
            self.on_gather(self._last[1].indices)
            return self._last[1]
        started = time.perf_counter()
        if self._next != wanted:
            self._ready.clear()
            self._loaded = stream(self._open_loader(_keys_from(self._sampler, self._augment, *wanted)))
        if not self._ready:
            self._ready.append(self._fetch(wanted))
        batch = self._ready.popleft()
        self._next = self._after(wanted)
        if self._copy_stream is not None:
            _sync_with_copy_stream(batch, self._copy_stream)
            self._ready.append(self._fetch(self._next))
        self.wait_s += time.perf_counter() - started
        self._last = wanted, batch
        self.on_gather(batch.indices)
        return batch

    def _fetch(self, position: Position) -> Batch:
        inputs, targets, indices = next(self._loaded)
        loaded = inputs, targets, indices[: self._sampler.plan.per_device_batch_size]  # others are mixed into them
        with torch.cuda.stream(self._copy_stream):  # None: no effect
            augment = self._augment
            if augment is None:
                return self._to_device(loaded)
            drawn = augment.draw(*position)
            return self._to_device(loaded, lambda images, labels: augment(images, labels, *drawn))

    def _after(self, position: Position) -> Position:
        step, micro_step = position
        last = micro_step + 1 == self._sampler.plan.grad_accum_steps
        return (step + 1, 0) if last else (step, micro_step + 1)


def _no_listener(_indices: Tensor) -> None:
    """The default `on_gather`."""


def _sync_with_copy_stream(batch: Batch, copy_stream: torch.cuda.Stream) -> None:
    """Make the current stream wait for `copy_stream`, and keep the batch's memory until the current stream is done."""
    current = torch.cuda.current_stream(copy_stream.device)
    current.wait_stream(copy_stream)
    change_each(partial(_record_stream, current), (batch.inputs, batch.targets))


def _record_stream(stream: torch.cuda.Stream, item: Any) -> Any:
    if isinstance(item, Tensor):
        item.record_stream(stream)
    return item


def _positions(sampler: ShardSampler, augment: Augment | None, micro_step: int) -> slice | Tensor:
    """Return where in the global batch the M examples are that a micro-batch is made of, its own B first."""
    return sampler.positions(micro_step) if augment is None else augment.positions(micro_step)


def _keys_from(
    sampler: ShardSampler, augment: Augment | None, step: int, micro_step: int
) -> Iterator[list[ExampleKey]]:
    """Yield the keys of every micro-batch from this position on, endlessly.

    Not a method of the batches: the loader that reads it would be part of a reference cycle, and its workers would
    live until the garbage collector finds the cycle and then waits 5 s for each worker.
    """
    while True:
        for each in range(micro_step, sampler.plan.grad_accum_steps):
            yield _keys_at(sampler, step, _positions(sampler, augment, each))
        step, micro_step = step + 1, 0


def _keys_at(sampler: ShardSampler, step: int, positions: slice | Tensor) -> list[ExampleKey]:
    """Return the keys of the examples at these positions in the global batch of a step."""
    epoch, in_epoch = divmod(step, sampler.steps_per_epoch)
    indices = sampler.at(step, positions).tolist()
    if not sampler.replaces:
        return [(epoch, index) for index in indices]
    # With the place, each draw of an example has random changes of its own.
    size = sampler.plan.global_batch_size
    places = (in_epoch * size + torch.arange(size))[positions].tolist()
    return [(epoch, place, index) for place, index in zip(places, indices, strict=True)]


def _to_inputs(loaded: Any, pixels: Pixels | None) -> Any:
    """Convert what a set gives to what the net gets."""
    return pixels(loaded) if pixels else to_default_dtype(loaded)


class ToDevice:
    """Moves a loaded batch to the device and converts its pixels to images there."""

    def __init__(self, pixels: Pixels | None, device: torch.device) -> None:
        self.pixels = pixels
        self.device = device

    def __call__(self, loaded: LoadedBatch, augment: Callable[[Any, Any], tuple[Any, Any]] | None = None) -> Batch:
        inputs, targets, indices = loaded
        labels = None
        if self.device.type != "cpu":
            labels = targets if isinstance(targets, Tensor) and targets.device.type == "cpu" else None
            inputs, targets = change_each(self._move, (inputs, targets))
        if augment is not None:
            inputs, targets = augment(inputs, targets)
            labels = None if labels is None else labels[: len(indices)]
        else:
            inputs = _to_inputs(inputs, self.pixels)
        return Batch(inputs, targets, indices, labels)

    def _move(self, item: Any) -> Any:
        return item.to(self.device, non_blocking=True) if isinstance(item, Tensor) else item.to(self.device)


def training_batches(
    examples: Examples, sampler: ShardSampler, config: DataConfig, device: torch.device, seed: int
) -> Batches:
    """Return resident or streaming batches; both are equal bit for bit."""
    if config.transforms:
        examples = transformed(examples, config.transforms)
    pixels = Pixels(config.normalize, device) if yields_pixels(examples) else None
    augment = Augment(config.augment, sampler, pixels, device) if config.augment and pixels else None
    if is_resident(examples, config, device):
        return ResidentBatches(examples, sampler, pixels, augment, device)
    return StreamingBatches(examples, sampler, pixels, augment, device, config.num_workers, seed)


def is_resident(examples: Examples, config: DataConfig, device: torch.device) -> bool:
    """Whether a set in memory is kept on the device: `data.resident`, else whether it takes at most half of the free
    device memory."""
    tensors = tensors_of(examples)
    if tensors is None:
        return False
    if config.resident is not None or device.type != "cuda":
        return config.resident is not False
    free, _total = torch.cuda.mem_get_info(device)
    return tensors[0].nbytes <= free // 2
