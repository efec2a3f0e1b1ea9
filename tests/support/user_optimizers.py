"""Schedules and optimizers of users."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer


def halved(step: int, total: int) -> float:
    return 1.0 if step < total // 2 else 0.5


def falling(step: int, total: int) -> float:
    return 0.9**step


def negative(step: int, total: int) -> float:
    return 1.0 if step < total - 1 else -1.0


def of_one(step: int) -> float:
    return 1.0 / (1 + step)


class Anchored(Optimizer):
    """Gradient descent that returns halfway to an anchor at each third step, as Lookahead does; all of its states are
    unlike those of torch's optimizers.

    It begins with a copy of the weights, with a scale that it draws, a count in int64, a history in a list and a text.
    The group counts the steps and grows a factor, as Prodigy does. Noise is drawn at each step.
    """

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.0, noise: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "noise": noise, "taken": 0, "factor": 1.0})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {
                    "anchor": parameter.detach().clone(),
                    "scale": torch.full_like(parameter, 1 + random.random()),
                    "count": torch.zeros((), dtype=torch.int64),
                    "history": [],
                    "phase": "away",
                }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["taken"] += 1
            group["factor"] *= 1.01
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, self.state[parameter], group)

    def _move(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        lr = group["lr"] * group["factor"] * (0.5 if state["phase"] == "back" else 1.0)
        state["scale"].mul_(0.9).add_(parameter.grad.abs())  # type: ignore[union-attr]
        state["count"] += 1
        state["history"] = [*state["history"], float(parameter.sum())][-2:]
        noisy = parameter.grad + group["noise"] * torch.rand(parameter.shape, dtype=parameter.dtype)
        parameter.mul_(1 - lr * group["weight_decay"]).addcdiv_(noisy, state["scale"], value=-lr)
        state["phase"] = "back" if int(state["count"]) % 3 == 0 else "away"
        if state["phase"] == "back":
            parameter.copy_(parameter.lerp(state["anchor"], 0.5))
            state["anchor"].copy_(parameter)


class Forgetful(SGD):
    """What it counts is in no state_dict."""

    taken = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.taken += 1
        for group in self.param_groups:
            group["weight_decay"] = 0.1 * self.taken
        super().step()


class Deaf(SGD):
    """Its learning rate is its own."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["lr"] = 0.1
        super().step()


class Undecayed(Optimizer):
    """It takes no weight_decay."""

    def __init__(self, params: Any, lr: float, slowness: float = 1.0) -> None:
        super().__init__(params, {"lr": lr, "slowness": slowness})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(parameter.grad, alpha=-group["lr"] / group["slowness"])


class Closure(SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        closure()
        super().step()


class TwoModes(SGD):
    """As those of schedulefree."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


class Hoarder(SGD):
    """It keeps what a checkpoint cannot hold."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            self.state[group["params"][0]]["seen"] = {1}


class Rateless(Optimizer):
    def __init__(self, params: Any, speed: float = 0.1) -> None:
        super().__init__(params, {"speed": speed})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass
