"""A user's data set in memory: its examples are made before training and kept as tensors."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from dist_train.data.loader import make_loader, stream
from dist_train.data.sets.available_memory import available_bytes
from dist_train.data.sets.image_set import (
    Examples,
    ImageSet,
    Subset,
    describe_example,
    describe_value,
    evenly_spaced,
    name_of,
    num_examples,
)
from dist_train.errors import DataError

_log = logging.getLogger(__name__)
_BATCH_SIZE = 32
_NUM_SAMPLES = 8  # a flip with probability 1/2 leaves all of them as they were once in 256
_SAMPLING_LIMIT_S = 0.5


class ResidentSet(Subset):
    """All examples of a map-style data set, as a loader collates them. The set itself still names and counts them."""

    def __init__(self, whole: Examples, inputs: Tensor, targets: Tensor) -> None:
        super().__init__(whole, range(len(inputs)))
        self.inputs = inputs  # [N, ...]
        self.targets = targets  # [N, ...]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]


def tensors_of(examples: Examples) -> tuple[Tensor, Tensor] | None:
    """Return the inputs [N, ...] and the targets [N, ...] of a set in memory; None of any other."""
    if isinstance(examples, ImageSet):
        return examples.images, examples.labels
    return (examples.inputs, examples.targets) if isinstance(examples, ResidentSet) else None


def make_resident(examples: Examples, seed: int, num_workers: int, ranks_per_node: int) -> ResidentSet:
    """Make every example of a data set and keep it. Each is made twice, since one that changes must be streamed.

    Raises:
        DataError: an example differs when it is made again, or from the others in shape or type; it is no pair of
            tensors or numbers; the set collates its batches itself; or the memory is too small.
        UserCodeError: an example cannot be made.
    """
    kept: tuple[Tensor, Tensor] | None = None
    done = 0
    for batch in _unchanging(examples, range(num_examples(examples)), seed, _BATCH_SIZE, num_workers):
        if kept is None:
            kept = _allocate(examples, batch, ranks_per_node)
        for rows, items in zip(kept, batch, strict=True):
            rows[done : done + len(items)] = items.detach()
        done += len(batch[0])
    assert kept is not None  # an empty set is refused before
    return ResidentSet(examples, *kept)


def unchanging_bytes(examples: Examples, seed: int) -> int | None:
    """Return the bytes of one example of a set that `make_resident` would accept, judged by a few of them.

    None if it would refuse one, if the set is in memory already, or if the examples take too long to make.
    """
    if tensors_of(examples) is not None:
        return None
    until = time.monotonic() + _SAMPLING_LIMIT_S
    size = None
    try:
        for batch in _unchanging(examples, evenly_spaced(examples, _NUM_SAMPLES), seed, batch_size=1):
            size = _bytes_per_example(batch)
            if time.monotonic() > until:
                return None
    except Exception:  # reported when a batch needs the example
        return None
    return size


class _Described(Subset):
    """The same examples. A batch is a description of each, and all of them collated if that is possible."""

    def collate(self, batch: list[Any]) -> tuple[list[str], Any]:
        forms, collated = list(map(describe_value, batch)), None
        with suppress(Exception):
            collated = default_collate(batch) if len(set(forms)) == 1 else None
        return forms, collated


def _unchanging(
    examples: Examples, indices: Sequence[int], seed: int, batch_size: int, num_workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs [B, ...] and targets [B, ...] of these examples, made in two epochs as for training, equal in both.

    Raises:
        DataError, UserCodeError: see `make_resident`.
    """
    if hasattr(examples, "collate"):
        raise _refusal(f"{name_of(examples)} has a method collate, which makes whole batches")
    described = _Described(examples, range(num_examples(examples)))
    keys = (
        [(epoch, index) for index in indices[start : start + batch_size]]
        for start in range(0, len(indices), batch_size)
        for epoch in (0, 1)
    )
    made = stream(make_loader(described, keys, num_workers, torch.device("cpu"), seed))
    expected = ""
    for (forms, batch, numbers), (other_forms, other_batch, _) in zip(made, made, strict=True):
        expected = expected or forms[0]
        for index, form, other in zip(numbers.tolist(), forms, other_forms, strict=True):
            if form != other:
                raise _changing(examples, index)
            if form != expected:
                raise _refusal(f"{describe_example(examples, index)} is {form}, and those before it are {expected}")
        if not _is_pair_of_tensors(batch):
            raise _refusal(f"{describe_example(examples, indices[0])} is {expected}, not a pair of tensors or numbers")
        for items, others in zip(batch, other_batch, strict=True):
            if not _same_bits(items, others):
                rows = zip(numbers.tolist(), items, others, strict=True)
                raise _changing(examples, next(index for index, *row in rows if not _same_bits(*row)))
        inputs, targets = batch
        yield inputs, targets


def _is_pair_of_tensors(batch: Any) -> bool:
    items = batch if isinstance(batch, list) else ()
    return len(items) == 2 and all(type(item) is Tensor and item.layout is torch.strided for item in items)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether tensors of one shape and type are the same to the bit: unlike with ==, a NaN equals itself."""
    return torch.equal(*(item.reshape(-1).view(torch.uint8) for item in (one, other)))


def _allocate(examples: Examples, batch: tuple[Tensor, Tensor], ranks_per_node: int) -> tuple[Tensor, Tensor]:
    total, size, free = num_examples(examples), _bytes_per_example(batch), available_bytes()
    needed = f"{total} examples of {size:,} bytes are {total * size / 1e6:,.1f} MB"
    there = "" if free is None else f", {free / 1e6:,.1f} MB free"
    if free is not None and total * size * ranks_per_node > free:
        raise _refusal(
            f"{name_of(examples)} does not fit in memory: {needed}, on each of {ranks_per_node} ranks per node{there}"
        )
    _log.info(
        "Reading %s into memory, each example twice: %s, %d ranks per node%s.",
        name_of(examples), needed, ranks_per_node, there,
    )  # fmt: skip
    inputs, targets = (torch.empty(total, *items.shape[1:], dtype=items.dtype) for items in batch)
    return inputs, targets


def _bytes_per_example(batch: tuple[Tensor, Tensor]) -> int:
    return sum(items[0].nbytes for items in batch)


def _changing(examples: Examples, index: int) -> DataError:
    return _refusal(f"{describe_example(examples, index)} differs when it is made again")


def _refusal(reason: str) -> DataError:
    return DataError(f"data.resident=true: {reason}. Remove data.resident, and the examples are streamed.")
