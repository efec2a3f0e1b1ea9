"""Side effects of a forward pass. They are observed, since the type of a module does not show them."""

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

_LOSS_TOLERANCE = 1e-4  # relative, between the loss over a micro-batch and over its halves
_STATE_TOLERANCE = 1e-5  # relative, between the state that two passes leave; bit-identical on a CPU


class ForwardEffects:
    """Records what a forward pass changes, over repeated passes on one batch with one seed."""

    def __init__(self, net: nn.Module) -> None:
        self._net = net
        self._attributes: list[dict[str, Any]] = []  # after each pass
        self._changes: dict[str, None] = {}  # ordered set: buffers that a forward changes, except BatchNorm's
        self._draws = self._draws_on_host = False
        self._loss = ""

    @contextmanager
    def watch_pass(self) -> Iterator[None]:
        """Record what a pass changes. Buffers are restored: the same tensors with the same values."""
        generators = generator_states()
        with same_buffers(self._net) as before:
            yield
            for module, path, old in before:
                if not isinstance(module, _BatchNorm) and not _is_same(old, self._net.get_buffer(path)):
                    self._changes[path] = None
        now = generator_states()
        self._draws |= now != generators
        self._draws_on_host |= now.host != generators.host
        self._attributes.append(dict(_plain_attributes(self._net)))

    def check_loss(self, objective: Objective, output: Any, targets: Any, size: int) -> None:
        """Compare the loss over `size` examples with that over their halves. Skips a loss that cannot be divided so."""
        if objective.is_plain or size < 2:
            return

        def over(rows: slice) -> float:
            loss = objective.loss(*(deepcopy(_rows(each, rows, size)) for each in (output, targets)))
            total: float = loss.item() * (rows.stop - rows.start)
            return total

        try:
            with torch.no_grad(), same_buffers(self._net):
                whole = over(slice(0, size)) / size
                halves = (over(slice(0, size // 2)) + over(slice(size // 2, size))) / size
        except Exception:  # it needs more than rows, such as what `forward` stored
            return
        if not math.isclose(whole, halves, rel_tol=_LOSS_TOLERANCE, abs_tol=1e-7):
            self._loss = f"the loss ({whole:.6g} over a micro-batch, {halves:.6g} over its halves)"

    @property
    def world_size_dependent(self) -> list[str]:
        """Descriptions of what makes the result depend on the division of a step over ranks and micro-batches."""
        causes = world_size_dependent_layers(self._net)
        if self._draws and not any("dropout" in each for each in causes):
            causes.append("random numbers in forward (drawn per rank and micro-batch)")
        if self._changes:
            causes.append(f"{first_of([*self._changes])} (changed by each forward)")
        return [*causes, self._loss] if self._loss else causes

    @property
    def changed_buffers(self) -> list[str]:
        """Names of the buffers that a forward in training changes."""
        batch_norm = [
            f"{path}.{name}" if path else name
            for path, module in self._net.named_modules()
            for name, _ in module.named_buffers(recurse=False)
            if isinstance(module, _BatchNorm)
        ]
        return [*batch_norm, *self._changes]

    @property
    def unsaved(self) -> list[str]:
        """Attributes that change from pass to pass and are not in checkpoints."""
        if len(self._attributes) < 2:
            return []
        first, last = self._attributes[0], self._attributes[-1]
        return [name for name in first if name in last and not _is_same(first[name], last[name])]

    @property
    def replay_obstacle(self) -> str:
        """Why replaying the kernels of one pass is not the same as calling the net again; "" if no reason was seen."""
        if self.unsaved:
            return f"each forward changes {first_of(self.unsaved)}, which a replayed one does not"
        if self._draws_on_host:
            return "forward draws random numbers on the host, which a replayed one repeats"
        return ""


def first_of(names: Sequence[str]) -> str:
    """Summarise names: "layers.0.weight and 11 more"."""
    return f"{names[0]} and {len(names) - 1} more" if names[1:] else names[0]


@contextmanager
def same_buffers(net: nn.Module) -> Iterator[list[tuple[nn.Module, str, Tensor]]]:
    """Restore all buffers at the end: the same tensors with the same values, even if the net has assigned others to
    their names. Yields for each its module, its path and a copy."""
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


def _plain_attributes(net: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the path and a comparable summary of each number, tensor and generator in a plain attribute."""
    for path, module in net.named_modules():
        for name, value in vars(module).items():
            summary = _summary(value)
            if summary is not None:
                yield f"{path}.{name}" if path else name, summary


def _summary(value: Any) -> Any:
    """Return what identifies the value of a number, tensor or generator; None for other types."""
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, Tensor):  # may be large, such as a stored output: keep only its sums
        with suppress(Exception):  # some types have no sum
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
        return math.isclose(one, other, rel_tol=_STATE_TOLERANCE) or (math.isnan(one) and math.isnan(other))
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
        return alike and bool(one.isclose(other, rtol=_STATE_TOLERANCE, atol=0, equal_nan=True).all())
    return bool(one == other)


def _rows(value: Any, rows: slice, size: int) -> Any:
    """Return these rows of each tensor in `value`.

    Raises:
        ValueError: `value` holds anything other than tensors with `size` rows.
    """
    if isinstance(value, Tensor) and value.shape[:1] == (size,):
        return value.detach()[rows]
    if isinstance(value, Mapping):
        return {name: _rows(each, rows, size) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_rows(each, rows, size) for each in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    raise ValueError
