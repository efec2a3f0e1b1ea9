"""From the name of an optimizer that takes its own step to what makes it: Muon, timm's, or a class of the user.

It is tried on a small matrix before anything trains with it, since only that shows what it needs and what it keeps.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_train.config.optimizer import OptimizerConfig
from dist_train.distributed.rng import seeded
from dist_train.errors import ConfigError, UserCodeError, did_you_mean
from dist_train.torchvision_compat import import_torchvision
from dist_train.training.step.muon import Muon
from dist_train.training.step.optimizer_state import load_state, saved_state
from dist_train.training.step.parameter_groups import set_learning_rate
from dist_train.user_code.importing import check_arguments, load_object, parameters_of, wrap_user_errors

Groups = list[dict[str, Any]]
_TRIED_STEPS = 8  # half of them after a resume


def find_optimizer(config: OptimizerConfig) -> Callable[[Groups], Optimizer]:
    """Return what makes an optimizer that takes its own step from groups of parameters.

    Raises:
        ConfigError: timm has no such optimizer or is missing, or the class does not take a setting.
        UserCodeError: it cannot be imported, is no optimizer, or cannot train here.
    """
    label = f"optimizer.name={config.name}"
    source, _, name = config.name.partition(":")
    kind: Any
    make: Callable[..., Optimizer]
    if config.name == "muon":
        kind, make = torch.optim.Muon, Muon
    elif source == "timm":
        kind, make = _of_timm(name)
    else:
        kind = make = load_object(config.name)
    if not (inspect.isclass(kind) and issubclass(kind, Optimizer)):
        raise UserCodeError(f"{label} is not a class that derives from torch.optim.Optimizer.")
    _check_interface(label, kind)
    _check_settings(label, kind, config)
    arguments = {"lr": config.lr, **config.arguments(), **config.args}

    def construct(groups: Groups) -> Optimizer:
        with seeded(0), wrap_user_errors(label, "cannot be constructed"):  # the same on every rank, if it draws
            return make(groups, **arguments)

    _try(config.name, construct)
    return construct


def _of_timm(name: str) -> tuple[Any, Callable[..., Optimizer]]:
    """Return the class of an optimizer of timm's, and what makes it."""
    import_torchvision()  # timm imports it
    try:
        optim = importlib.import_module("timm.optim")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "timm":
            raise
        raise ConfigError(f"optimizer.name=timm:{name} needs timm: pip install 'dist-train[timm]'.") from None
    names = optim.list_optimizers()
    inner = name.removeprefix("lookahead_")
    if inner not in names:
        raise ConfigError(
            f"optimizer.name=timm:{name}: no such optimizer.{did_you_mean(name, names, 'timm:')} "
            f"timm.optim.list_optimizers() has all names."
        )
    with wrap_user_errors(f"optimizer.name=timm:{name}", "cannot be imported"):
        kind = optim.get_optimizer_class(inner, bind_defaults=False)
    return kind, lambda groups, **arguments: optim.create_optimizer_v2(groups, opt=name, **arguments)


def _check_interface(label: str, kind: type[Optimizer]) -> None:
    step = [*inspect.signature(kind.step).parameters.values()][1:]
    needed = [each.name for each in step if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD]
    if needed:
        raise UserCodeError(
            f"{label}: its step() needs {', '.join(needed)}, and a step here has one gradient and no function that "
            f"computes others. Use an optimizer whose step() needs no argument."
        )
    if all(callable(getattr(kind, mode, None)) for mode in ("train", "eval")):
        raise UserCodeError(
            f"{label} has train() and eval(): it evaluates other weights than it trains. Use another optimizer, with "
            f"ema_decay=0.999 to evaluate averaged weights."
        )


def _check_settings(label: str, kind: type[Optimizer], config: OptimizerConfig) -> None:
    check_arguments(kind, config.args, "optimizer.args")
    legal, open_ended = parameters_of(kind)
    if open_ended:
        return
    if "lr" not in legal:
        raise UserCodeError(f"{label} takes no lr, which the schedule sets. It takes: {', '.join(legal)}.")
    if "weight_decay" not in legal:
        set_by = {
            "weight_decay": config.weight_decay, "no_decay": config.no_decay,
            **{f"groups.{index}.weight_decay": each.weight_decay for index, each in enumerate(config.groups)},
        }  # fmt: skip
        for key, value in set_by.items():
            if value is not None:
                raise ConfigError(
                    f"optimizer.{key}={value}: {config.name} takes no weight_decay. Leave it out. It takes: "
                    f"{', '.join(legal)}."
                )


def _try(name: str, construct: Callable[[Groups], Optimizer]) -> None:
    """Train a small matrix: without a closure, with the learning rate of its group, and resumed as if never stopped.

    Raises:
        UserCodeError: it cannot be trained so.
    """
    label = f"optimizer.name={name}"
    with seeded(0):
        start, other, *gradients = torch.randn(2 + _TRIED_STEPS, 4, 3) / 1000
    half = _TRIED_STEPS // 2
    whole, slower, resumed = (_Trained(label, construct, weights) for weights in (start, start, other))
    whole.take(gradients[:half], lr=0.1)
    saved = deepcopy(saved_state(whole.optimizer, name))
    resumed.weights.data.copy_(whole.weights.data)
    load_state(resumed.optimizer, saved)
    resumed.take(gradients[half:], lr=0.1)
    whole.take(gradients[half:], lr=0.1)
    slower.take(gradients[:half], lr=1e-8)
    slower.take(gradients[half:], lr=1e-8)
    if not whole.has_weights_of(resumed):
        raise UserCodeError(
            f"{label}: its steps after a resume differ, since state_dict() does not hold all that they depend on. Keep "
            f"it in self.state or in self.param_groups."
        )
    if whole.has_weights_of(slower):
        raise UserCodeError(
            f"{label} takes the same steps for any lr in its param_groups, where the schedule sets it. Read "
            f'group["lr"] in step().'
        )


class _Trained:
    """A matrix and its optimizer."""

    def __init__(self, label: str, construct: Callable[[Groups], Optimizer], weights: Tensor) -> None:
        self.weights = nn.Parameter(weights.clone())
        self.optimizer = construct([{"params": [self.weights], "param_names": ["weight"], "lr_factor": 1.0}])
        self._label = label

    def take(self, gradients: list[Tensor], lr: float) -> None:
        for number, gradient in enumerate(gradients):
            self.weights.grad = gradient.clone()
            set_learning_rate(self.optimizer.param_groups, lr)
            with seeded(number), wrap_user_errors(self._label, "fails on a gradient, without a closure"):
                self.optimizer.step()

    def has_weights_of(self, other: _Trained) -> bool:
        return torch.equal(self.weights.data.nan_to_num(), other.weights.data.nan_to_num())
