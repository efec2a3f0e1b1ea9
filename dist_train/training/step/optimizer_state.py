"""The state of an optimizer, saved and loaded to the bit."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dist_train.errors import UserCodeError
from dist_train.training.step.parameter_groups import check_same_groups

# The keys of param_groups that come from this process: the first three select an implementation in torch, and older
# checkpoints have no factor.
_OWN = ("fused", "foreach", "capturable", "lr_factor")
_PLAIN = (int, float, bool, str, torch.dtype, type(None))


def saved_state(optimizer: Optimizer, name: str) -> dict[str, Any]:
    """Return the state of the optimizer `name`.

    Raises:
        UserCodeError: it holds what a checkpoint, which is read without executing code, cannot hold.
    """
    state = optimizer.state_dict()
    _check_plain(name, state)
    return state


def load_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Like `load_state_dict`, but to the bit, and keeps the implementation of this process, not that of the one that
    saved.

    Raises:
        ValueError: the groups of the saved state hold other parameters.
    """
    check_same_groups(optimizer.param_groups, state["param_groups"])
    own = implementation_of(optimizer)
    optimizer.load_state_dict(state)
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    numbers = chain.from_iterable(group["params"] for group in state["param_groups"])
    for parameter, number in zip(parameters, numbers, strict=True):
        if parameter in optimizer.state and number in state["state"]:
            optimizer.state[parameter] = _as_saved(optimizer.state[parameter], state["state"][number])
    set_implementation(optimizer, own)


def implementation_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return for each group of parameters what selects its implementation."""
    return [{key: group[key] for key in _OWN if key in group} for group in optimizer.param_groups]


def set_implementation(optimizer: Optimizer, implementation: list[dict[str, Any]]) -> None:
    for group, own in zip(optimizer.param_groups, implementation, strict=True):
        group.update(own, lr=float(group["lr"]))  # a compiled step has a tensor


def _as_saved(loaded: Any, saved: Any) -> Any:
    """Return `loaded` with the saved types: torch gives all tensors that of the parameter, and does not keep text."""
    if isinstance(loaded, Tensor):
        return loaded if loaded.dtype == saved.dtype else saved.to(loaded.device)
    if isinstance(loaded, dict):
        return {key: _as_saved(value, saved[key]) if key in saved else value for key, value in loaded.items()}
    if isinstance(loaded, (list, tuple)):
        return type(loaded)(map(_as_saved, loaded, saved))
    return saved


def _check_plain(name: str, value: Any, key: str = "") -> None:
    if isinstance(value, dict):
        for inner, each in value.items():
            _check_plain(name, each, str(inner))
    elif type(value) in (list, tuple):
        for each in value:
            _check_plain(name, each, key)
    elif type(value) not in _PLAIN and not isinstance(value, Tensor):
        raise UserCodeError(
            f"optimizer.name={name}: its state holds {key} of type {type(value).__name__}, which a checkpoint cannot. "
            f"Keep tensors, numbers, text, lists and dicts."
        )
