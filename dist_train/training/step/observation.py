"""What a forward does besides computing. Found by looking, since no type of a module tells it."""

from __future__ import annotations

import math
import pickle
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_train.distributed.rng import generator_states
from dist_train.models.invariance import world_size_dependent_layers
from dist_train.models.tasks.objective import Objective
from dist_train.training.step.mode_selection import unchanged

_LOSS = 1e-4  # relative, between the loss over a micro-batch and over its halves
_KEPT = 1e-5  # relative, between what a net keeps of two passes; on a CPU that is the same to the bit


class Observation:
    """Of passes over one and the same batch under the same seed."""

    def __init__(self, net: nn.Module) -> None:
        self._net = net
        self._kept: list[dict[str, Any]] = []  # after each pass
        self._changes: dict[str, None] = {}  # an ordered set: buffers that a forward changes, those of BatchNorm aside
        self._draws = False
        self._loss = ""

    @contextmanager
    def watch_pass(self) -> Iterator[None]:
        """Buffers hold afterwards what they held before, and are the tensors that they were."""
        generators = generator_states()
        with _same_buffers(self._net) as before:
            yield
            for module, path, old in before:
                if not isinstance(module, _BatchNorm) and not _is_same(old, self._net.get_buffer(path)):
                    self._changes[path] = None
        self._draws |= generator_states() != generators
        self._kept.append(dict(_kept_by(self._net)))

    def check_loss(self, objective: Objective, output: Any, targets: Any, size: int) -> None:
        """Of the loss over `size` examples and over its halves. One that cannot be divided so is left alone."""
        if objective.is_plain or size < 2:
            return

        def over(rows: slice) -> float:
            loss = objective.loss(*(deepcopy(_rows(each, rows, size)) for each in (output, targets)))
            total: float = loss.item() * (rows.stop - rows.start)
            return total

        try:
            with torch.no_grad(), _same_buffers(self._net):
                whole = over(slice(0, size)) / size
                halves = (over(slice(0, size // 2)) + over(slice(size // 2, size))) / size
        except Exception:  # it wants more than rows: what `forward` has kept, say
            return
        if not math.isclose(whole, halves, rel_tol=_LOSS, abs_tol=1e-7):
            self._loss = f"the loss ({whole:.6g} over a micro-batch, {halves:.6g} over its halves)"

    @property
    def world_size_dependent(self) -> list[str]:
        """What makes the result depend on how a step is divided over ranks and micro-batches, for people."""
        found = world_size_dependent_layers(self._net)
        if self._draws and not any("dropout" in each for each in found):
            found.append("random numbers in forward (drawn per rank and micro-batch)")
        if self._changes:
            found.append(f"{first_of([*self._changes])} (changed by each forward)")
        return [*found, self._loss] if self._loss else found

    @property
    def unsaved(self) -> list[str]:
        """Attributes that go on from pass to pass and are in no checkpoint."""
        if len(self._kept) < 2:
            return []
        first, last = self._kept[0], self._kept[-1]
        return [name for name in first if name in last and not _is_same(first[name], last[name])]


def first_of(names: Sequence[str]) -> str:
    """For people: "layers.0.weight and 11 more"."""
    return f"{names[0]} and {len(names) - 1} more" if names[1:] else names[0]


@contextmanager
def _same_buffers(net: nn.Module) -> Iterator[list[tuple[nn.Module, str, Tensor]]]:
    """Buffers hold afterwards what they held before, and are the tensors that they were, also where a net assigns
    others to their names. Yields for each its module, its path and a copy."""
    places = [
        (module, f"{path}.{name}" if path else name, name, buffer)
        for path, module in net.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    with unchanged(buffer for *_, buffer in places) as values:
        try:
            yield [(module, path, value) for (module, path, *_), value in zip(places, values, strict=True)]
        finally:
            for module, _, name, buffer in places:
                setattr(module, name, buffer)


def _kept_by(net: nn.Module) -> Iterator[tuple[str, Any]]:
    """Numbers, tensors and generators that are plain attributes: by path, what can be compared later."""
    for path, module in net.named_modules():
        for name, value in vars(module).items():
            found = _print_of(value)
            if found is not None:
                yield f"{path}.{name}" if path else name, found


def _print_of(value: Any) -> Any:
    """None for what is none of these."""
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, Tensor):  # it may be large, an output that is kept say: only its sums are
        with suppress(Exception):  # of a kind that cannot be added up
            numbers = value.detach().to("cpu", torch.float64)
            return value.shape, float(numbers.sum()), float(numbers.square().sum())
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, (np.random.Generator, np.random.RandomState, random.Random)):
        return pickle.dumps(value)
    return None


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=_KEPT) or (math.isnan(one) and math.isnan(other))
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
        return alike and bool(one.isclose(other, rtol=_KEPT, atol=0, equal_nan=True).all())
    return bool(one == other)


def _rows(value: Any, rows: slice, size: int) -> Any:
    """Those of each tensor in `value`.

    Raises:
        ValueError: something in there has another number of rows than `size`.
    """
    if isinstance(value, Tensor) and value.shape[:1] == (size,):
        return value.detach()[rows]
    if isinstance(value, Mapping):
        return {name: _rows(each, rows, size) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_rows(each, rows, size) for each in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    raise ValueError
