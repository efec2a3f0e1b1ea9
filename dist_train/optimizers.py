"""An optimizer by name, and its step without what torch wraps around it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dist_train.config import OptimizerConfig

_CLASSES: dict[str, type[Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adadelta": torch.optim.Adadelta,
    "rmsprop": torch.optim.RMSprop,
}
_FUSED = ("adam", "adamw", "sgd")


def build_optimizer(config: OptimizerConfig, net: nn.Module, device: torch.device) -> Optimizer:
    """The optimizer by name, fused where torch has that (1.07x to 1.21x a whole step on two cores)."""
    _leave_the_compiler_alone()
    fused = {"fused": True} if config.name in _FUSED and device.type in ("cpu", "cuda") else {}
    arguments: dict[str, Any] = {"lr": config.lr, **config.arguments(), **fused}
    return _CLASSES[config.name](net.parameters(), **arguments)


def bare_step(optimizer: Optimizer) -> Callable[[], None]:
    """`optimizer.step` as its class defines it: no profiler record, no hooks, no import of the compiler."""
    step: Callable[[Optimizer], Any] = inspect.unwrap(type(optimizer).step)

    def take() -> None:
        with torch.no_grad():
            step(optimizer)

    return take


def _leave_the_compiler_alone() -> None:
    """Methods of torch's Optimizer import torch._dynamo when first called, to tell it not to trace them: 1.5 s.

    Each asks its function for this attribute first.
    """
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        function = inspect.unwrap(getattr(Optimizer, name))
        function.__dynamo_disable = function
