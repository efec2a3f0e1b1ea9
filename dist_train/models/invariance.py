"""Parts of a net whose result depends on the world size, and the random generators that a net needs seeded."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable

from torch import nn

from dist_train.distributed.rng import seed_everything, seed_torch
from dist_train.models import nets


def is_ours(net: nn.Module) -> bool:
    """Whether `net` is one of this package: its forward changes nothing and exchanges nothing between ranks."""
    return type(net).__module__ == nets.__name__


def seeding_for(net: nn.Module, training: bool) -> Callable[[int], None]:
    """Return the cheapest function that seeds all generators a forward pass of `net` uses (all of them take 35 us).

    Our own nets draw only in dropout; user code may draw from any generator, also in evaluation.
    """
    if not is_ours(net):
        return seed_everything
    return seed_torch if training and world_size_dependent_layers(net) else lambda _seed: None


_FUNCTIONAL_DROPOUT = re.compile(r"(feature_)?(alpha_)?dropout[123]?d?_?")
_DROP_LAYERS = ("StochasticDepth", "DropBlock2d", "DropBlock3d")  # torchvision's layers with the drop rate `p`
_RATES = ("dropout", "drop_rate", "drop_prob")  # in torch's attention and recurrent layers, torchvision, timm


def world_size_dependent_layers(model: nn.Module) -> list[str]:
    """Describe the parts of a net whose result depends on how a step is divided over ranks and micro-batches."""
    modules = list(model.modules())
    parts = []
    if any(_takes_batch_statistics(module) for module in modules):
        parts.append("BatchNorm (statistics per forward)")
    drops = any(drop_rates(module) for module in modules)
    if drops or any(_calls_dropout(kind) for kind in {type(module) for module in modules}):
        parts.append("dropout (drawn per rank and micro-batch)")
    return parts


def _takes_batch_statistics(module: nn.Module) -> bool:
    """Return whether it is a BatchNorm layer, except one in evaluation mode that has running statistics."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None)


def drop_rates(module: nn.Module) -> list[str]:
    """Return the names of a module's attributes that are drop rates > 0. `p` of another layer may be an exponent."""
    kind = type(module)
    by_p = isinstance(module, nn.modules.dropout._DropoutNd) or kind.__name__ in _DROP_LAYERS or _calls_dropout(kind)
    names = ("p", *_RATES) if by_p else _RATES
    return [name for name in names if isinstance(rate := getattr(module, name, None), float) and rate > 0]


def _calls_dropout(kind: type) -> bool:
    """Return whether the source of a user's class calls `F.dropout` or a variant of it, without a dropout module."""
    for cls in kind.__mro__:
        if cls.__module__.partition(".")[0] in ("builtins", "torch", "torchvision", "timm", "dist_train"):
            continue  # their dropout is found by modules and attributes
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
        except (OSError, TypeError, SyntaxError):
            continue
        for call in [node for node in ast.walk(tree) if isinstance(node, ast.Call)]:
            function = call.func
            on_self = isinstance(function, ast.Attribute) and ast.unparse(function.value) == "self"  # calls a module
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if not on_self and _FUNCTIONAL_DROPOUT.fullmatch(name):
                return True
    return False
