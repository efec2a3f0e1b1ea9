"""torch's Muon for the matrices of hidden layers and AdamW for all else, as one optimizer."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dist_train.errors import ConfigError


class Muon(Optimizer):
    """Both share the state and the scheduled learning rate; `optimizer` of a group of parameters says whose it is."""

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, weight_decay: float | None = None, **of_muon: Any
    ) -> None:
        """Groups without an `optimizer` are Muon's. weight_decay None: the default of each.

        The steps of Muon are as large as those of AdamW unless `of_muon` says otherwise, so that one lr suits both.
        """
        decay: dict[str, Any] = {} if weight_decay is None else {"weight_decay": weight_decay}
        kinds = {
            "Muon": (torch.optim.Muon, {"adjust_lr_fn": "match_rms_adamw"} | of_muon),
            "AdamW": (torch.optim.AdamW, {}),
        }
        self._parts: dict[str, Optimizer] = {}
        for name, (kind, own) in kinds.items():
            if part := [group | {"optimizer": name} for group in groups if group.get("optimizer", "Muon") == name]:
                self._parts[name] = kind(part, lr=lr, **decay, **own)
        super().__init__([group for part in self._parts.values() for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for name, part in self._parts.items():
            part.state = self.state  # a loaded state is another object, and so are its groups
            part.param_groups = [group for group in self.param_groups if group["optimizer"] == name]
            inspect.unwrap(type(part).step)(part)  # the wrappers import the compiler, which takes 1.5 s


def divide(groups: list[dict[str, Any]], net: nn.Module) -> list[dict[str, Any]]:
    """Divide each group into the hidden matrices of the net, for Muon, and the rest, for AdamW.

    Raises:
        ConfigError: there is no such matrix.
    """
    hidden, parts = hidden_matrices(net), []
    for name in ("Muon", "AdamW"):
        for group in groups:
            pairs = zip(group["param_names"], group["params"], strict=True)
            chosen = {key: each for key, each in pairs if (key in hidden) == (name == "Muon")}
            if chosen:
                own = {"params": [*chosen.values()], "param_names": [*chosen], "optimizer": name}
                parts.append(group | own)
    return parts


def hidden_matrices(net: nn.Module) -> set[str]:
    """Return the names of the matrices of hidden layers: not of the first and the last layer, nor of embeddings.

    A layer is a module that has a weight with two or more dimensions, in the order in which the net defines them.
    torch.optim.Muon takes matrices only, no filters of a convolution.

    Raises:
        ConfigError: there is none.
    """
    layers = [
        (path, module)
        for path, module in net.named_modules()
        if path and any(each.dim() > 1 for each in module.parameters(recurse=False))
    ]
    found = {
        f"{path}.{name}"
        for path, module in layers[1:-1]
        if not isinstance(module, nn.Embedding)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 2
    }
    if not found:
        raise ConfigError(
            f"optimizer.name=muon: {type(net).__name__} has no matrix in a hidden layer, and torch.optim.Muon takes no "
            f"filters of a convolution. Use optimizer.name=adamw, or timm:muon, which takes them."
        )
    return found
