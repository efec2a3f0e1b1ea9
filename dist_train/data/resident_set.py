"""A user's data set in memory: its examples are made before training and kept as tensors."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from dist_train.data.loader import make_loader, stream
from dist_train.data.sets.available_memory import available_bytes
from dist_train.data.sets.image_set import (
    Examples,
    ImageSet,
    Subset,
    describe_example,
    describe_value,
    locate,
    num_examples,
)
from dist_train.errors import DataError

_log = logging.getLogger(__name__)
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
    for index, example in enumerate(_unchanging(examples, range(num_examples(examples)), seed, num_workers)):
        if kept is None:
            kept = _allocate(examples, example, ranks_per_node)
        for rows, item in zip(kept, example, strict=True):
            rows[index] = item
    assert kept is not None  # an empty set is refused before
    return ResidentSet(examples, *kept)


def unchanging_bytes(examples: Examples, seed: int) -> int | None:
    """Return the bytes of one example of a set that `make_resident` would accept, judged by a few of them.

    None if it would refuse one, if the set is in memory already, or if the examples take too long to make.
    """
    if tensors_of(examples) is not None:
        return None
    last = num_examples(examples) - 1
    indices = sorted({last * part // (_NUM_SAMPLES - 1) for part in range(_NUM_SAMPLES)})
    until = time.monotonic() + _SAMPLING_LIMIT_S
    size = None
    try:
        for example in _unchanging(examples, indices, seed):
            size = _num_bytes(example)
            if time.monotonic() > until:
                return None
    except Exception:  # reported when a batch needs the example
        return None
    return size


def _unchanging(
    examples: Examples, indices: Iterable[int], seed: int, num_workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield input and target of these examples, made in two epochs as for training and equal both times.

    Raises:
        DataError, UserCodeError: see `make_resident`.
    """
    if getattr(examples, "collate", None) is not None:
        name = type(locate(examples, 0)[0]).__name__
        raise _refusal(f"{name} has a method collate, which makes whole batches")
    keys = ([(epoch, index)] for index in indices for epoch in (0, 1))
    made = stream(make_loader(examples, keys, num_workers, torch.device("cpu"), seed))
    form = ""
    for once, again in zip(made, made, strict=True):
        index = int(once[2])
        if not all(type(item) is Tensor and item.layout is torch.strided for item in once[:2]):
            raise _refusal(f"{describe_example(examples, index)} is {describe_value(once[:2])} in a batch, not tensors")
        example, other = ((inputs[0], targets[0]) for inputs, targets, _ in (once, again))
        found = describe_value(example)
        if found != (form or found):
            raise _refusal(f"{describe_example(examples, index)} is {found}, and those before it are {form}")
        if not all(map(_same_bits, example, other)):
            raise _refusal(f"{describe_example(examples, index)} differs when it is made again")
        form = found
        yield example


def _same_bits(one: Tensor, other: Any) -> bool:
    """Whether both are the same to the bit: unlike ==, a NaN equals itself."""
    if describe_value(one) != describe_value(other):
        return False
    return torch.equal(*(item.reshape(-1).view(torch.uint8) for item in (one, other)))


def _allocate(examples: Examples, example: tuple[Tensor, Tensor], ranks_per_node: int) -> tuple[Tensor, Tensor]:
    total, size, free = num_examples(examples), _num_bytes(example), available_bytes()
    name = type(locate(examples, 0)[0]).__name__
    needed = f"{total} examples of {size:,} bytes are {total * size / 1e6:,.2f} MB"
    there = "" if free is None else f", {free / 1e6:,.2f} MB free"
    if free is not None and total * size * ranks_per_node > free:
        raise _refusal(f"{name} does not fit in memory: {needed}, on each of {ranks_per_node} ranks per node{there}")
    _log.info(
        "Reading %s into memory, each example twice: %s, %d ranks per node%s.", name, needed, ranks_per_node, there
    )
    inputs, targets = (torch.empty(total, *item.shape, dtype=item.dtype) for item in example)
    return inputs, targets


def _num_bytes(example: tuple[Tensor, Tensor]) -> int:
    return sum(item.nbytes for item in example)


def _refusal(reason: str) -> DataError:
    return DataError(f"data.resident=true: {reason}. Remove data.resident, and the examples are streamed.")
