"""Optimizers by name, and their step in the form that each update mode needs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dist_train.config.optimizer import OptimizerConfig
from dist_train.distributed.devices import is_device_assert, is_out_of_memory
from dist_train.distributed.rng import derive_seed, seed_everything
from dist_train.errors import UserCodeError
from dist_train.training.step.muon import divide
from dist_train.training.step.optimizer_names import find_optimizer
from dist_train.training.step.parameter_groups import parameter_groups
from dist_train.user_code.importing import wrap_user_errors

_CLASSES: dict[str, type[Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adadelta": torch.optim.Adadelta,
    "rmsprop": torch.optim.RMSprop,
}
_FUSED = ("adam", "adamw", "sgd")


def build_optimizer(config: OptimizerConfig, net: nn.Module, device: torch.device) -> Optimizer:
    """Build the optimizer, fused if torch supports it (1.07x to 1.21x a whole step on two cores).

    Raises:
        ConfigError: as `find_optimizer`, or a group of parameters matches none.
        UserCodeError: as `find_optimizer`, or the net defines its own, which would be ignored.
    """
    if hasattr(net, "configure_optimizers"):
        raise UserCodeError(
            f"{type(net).__name__}.configure_optimizers is not called: optimizer and schedule are settings, such as "
            f"optimizer.name=adamw optimizer.lr=3e-4 schedule.name=cosine; a weight with requires_grad=False is not "
            f"trained. Use these, and remove the method."
        )
    _avoid_compiler_import()
    groups = parameter_groups(config, net)
    if config.name == "muon":
        groups = divide(groups, net)
    if config.own_step:
        return find_optimizer(config)(groups)
    fused = {"fused": True} if config.name in _FUSED and device.type in ("cpu", "cuda") else {}
    arguments: dict[str, Any] = {"lr": config.lr, **config.arguments(), **fused}
    return _CLASSES[config.name](groups, **arguments)


def begin_momenta(optimizer: Optimizer) -> None:
    """Give the trained parameters that SGD has no momentum of one of zero: its fused kernel takes all or none."""
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            state = optimizer.state[parameter]
            if parameter.requires_grad and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)


def bare_step(optimizer: Optimizer) -> Callable[[], None]:
    """Return `optimizer.step` as its class defines it: no profiler record, no hooks, no import of the compiler."""
    step: Callable[[Optimizer], Any] = inspect.unwrap(type(optimizer).step)

    def take() -> None:
        with torch.no_grad():
            step(optimizer)

    return take


def seeded_step(optimizer: Optimizer, name: str, seed: int) -> Callable[[int], None]:
    """Return `optimizer.step` for a step number. What it draws is the same on every rank and after a resume."""

    def take(step: int) -> None:
        seed_everything(derive_seed(seed, "optimizer", step))
        with wrap_user_errors(f"optimizer.name={name}", f"fails at step {step + 1}", pass_through=_is_of_the_device):
            optimizer.step()

    return take


def _is_of_the_device(error: BaseException) -> bool:
    return is_out_of_memory(error) or is_device_assert(error)


def traceable_step(optimizer: Optimizer, device: torch.device, fused: bool) -> Callable[[], None]:
    """Return an `optimizer.step` to compile or capture: all on the device, where each group's lr [] is read anew.

    `fused` keeps torch's fused kernel (a compiler fuses the plain one better). Runs on a stand-in for the optimizer,
    since torch._dynamo rejects a real one whose gradients come from the same graph.
    """
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], device=device)
        if not (fused and group.get("fused")):
            group.update({"fused": False, "foreach": True} | ({"capturable": True} if "capturable" in group else {}))
    for state in optimizer.state.values():
        if "step" in state and state["step"].device.type != device.type:  # not if equal: cpu:0 would be a copy of cpu
            state["step"] = state["step"].to(device)
    step: Callable[[Any], Any] = inspect.unwrap(type(optimizer).step)
    stand_in = _OptimizerStandIn(optimizer)

    def take() -> None:
        with torch.no_grad():
            step(stand_in)

    return take


class _OptimizerStandIn:
    """The part of an optimizer that `step` uses."""

    grad_scale = found_inf = None

    def __init__(self, optimizer: Optimizer) -> None:
        self.param_groups = optimizer.param_groups
        self.state = optimizer.state
        # Unwrapped: torch._dynamo, once loaded, disables tracing of this method.
        self._collect: Callable[..., Any] = inspect.unwrap(type(optimizer)._init_group)  # type: ignore[attr-defined]

    def _init_group(self, *lists: Any) -> Any:
        return self._collect(self, *lists)

    def _accelerator_graph_capture_health_check(self) -> None:
        """Does nothing: `traceable_step` has prepared the optimizer."""


def _avoid_compiler_import() -> None:
    """Prevent the import of torch._dynamo (1.5 s) by methods of torch's Optimizer, which disable its tracing.

    Each method first looks for this attribute on its function.
    """
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        function = inspect.unwrap(getattr(Optimizer, name))
        function.__dynamo_disable = function
