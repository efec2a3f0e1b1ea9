"""An optimizer by name, and its step in the forms that the modes of an update need."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_train.config.schema import OptimizerConfig
from dist_train.errors import UserCodeError

_CLASSES: dict[str, type[Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adadelta": torch.optim.Adadelta,
    "rmsprop": torch.optim.RMSprop,
}
_FUSED = ("adam", "adamw", "sgd")


def build_optimizer(config: OptimizerConfig, net: nn.Module, device: torch.device) -> Optimizer:
    """The optimizer by name, fused where torch has that (1.07x to 1.21x a whole step on two cores).

    Raises:
        UserCodeError: the net has one of its own, which would not be asked.
    """
    if hasattr(net, "configure_optimizers"):
        raise UserCodeError(
            f"{type(net).__name__}.configure_optimizers is not called: optimizer and schedule are settings, such as "
            f"optimizer.name=adamw optimizer.lr=3e-4 schedule.name=cosine, and a weight with requires_grad=False stays "
            f"as it is. Set them so, and remove the method."
        )
    _leave_the_compiler_alone()
    fused = {"fused": True} if config.name in _FUSED and device.type in ("cpu", "cuda") else {}
    arguments: dict[str, Any] = {"lr": config.lr, **config.arguments(), **fused}
    return _CLASSES[config.name](net.parameters(), **arguments)


# What chooses among torch's implementations of one optimizer, in its param_groups. Not part of a checkpoint's meaning.
_IMPLEMENTATION = ("fused", "foreach", "capturable")


def load_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """As `load_state_dict`, but computing goes on as this process began it, not as the one that saved it did."""
    own = [{key: group[key] for key in _IMPLEMENTATION if key in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, implementation in zip(optimizer.param_groups, own, strict=True):
        group.update(implementation)


def bare_step(optimizer: Optimizer) -> Callable[[], None]:
    """`optimizer.step` as its class defines it: no profiler record, no hooks, no import of the compiler."""
    step: Callable[[Optimizer], Any] = inspect.unwrap(type(optimizer).step)

    def take() -> None:
        with torch.no_grad():
            step(optimizer)

    return take


def traceable_step(optimizer: Optimizer, lr: Tensor, fused: bool) -> Callable[[], None]:
    """`optimizer.step` that a compiler or a graph can take in: all on the device, with `lr` [] read at every call.

    `fused` keeps torch's fused kernel (a compiler fuses the plain one better). Called on an object that only looks
    like the optimizer, since torch._dynamo refuses a real one whose gradients the same graph has made.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
        if not (fused and group.get("fused")):
            group.update({"fused": False, "foreach": True} | ({"capturable": True} if "capturable" in group else {}))
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = state["step"].to(lr.device)
    step: Callable[[Any], Any] = inspect.unwrap(type(optimizer).step)
    likeness = _Likeness(optimizer)

    def take() -> None:
        with torch.no_grad():
            step(likeness)

    return take


class _Likeness:
    """What `step` asks of its optimizer."""

    grad_scale = found_inf = None

    def __init__(self, optimizer: Optimizer) -> None:
        self.param_groups = optimizer.param_groups
        self.state = optimizer.state
        # The compiler forbids itself this one, once it is loaded.
        self._collect: Callable[..., Any] = inspect.unwrap(type(optimizer)._init_group)  # type: ignore[attr-defined]

    def _init_group(self, *lists: Any) -> Any:
        return self._collect(self, *lists)

    def _accelerator_graph_capture_health_check(self) -> None:
        """Ours is prepared for it."""


def _leave_the_compiler_alone() -> None:
    """Methods of torch's Optimizer import torch._dynamo when first called, to tell it not to trace them: 1.5 s.

    Each asks its function for this attribute first.
    """
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        function = inspect.unwrap(getattr(Optimizer, name))
        function.__dynamo_disable = function
