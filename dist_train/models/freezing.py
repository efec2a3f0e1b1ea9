"""The part of a net that is not trained for now (`model.freeze`)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_train.errors import ConfigError, did_you_mean
from dist_train.models.name_patterns import covers


class Frozen:
    """Parameters without a gradient, and BatchNorm layers that normalise by their running statistics and keep them."""

    def __init__(self, net: nn.Module, patterns: Sequence[str], until: int | None = None) -> None:
        """Freeze what the patterns match, by its own name or that of a module around it.

        `until`: the number (from 0) of the first step that trains all of the net again; None: there is none.

        Raises:
            ConfigError: a pattern matches nothing, or nothing is left to train.
        """
        self.until = until
        named = dict(net.named_parameters(remove_duplicate=False))  # tied ones are frozen by either name
        norms = {path: module for path, module in net.named_modules() if isinstance(module, _BatchNorm)}
        for pattern in patterns:
            if not any(covers(pattern, name) for name in (*named, *norms)):
                names = [path for path, module in net.named_modules() if next(module.parameters(), None) is not None]
                raise ConfigError(
                    f"model.freeze: {pattern} matches no parameter or layer of {type(net).__name__}."
                    f"{did_you_mean(pattern, [*names, *named])} Its parts: "
                    f"{', '.join(name for name in names if name and '.' not in name) or ', '.join(named)}."
                )

        def is_frozen(name: str) -> bool:
            return any(covers(pattern, name) for pattern in patterns)

        # What the net has frozen itself stays so, here and in `release`.
        self._parameters = {each for name, each in named.items() if is_frozen(name) and each.requires_grad}
        trained = sum(parameter.requires_grad for parameter in net.parameters()) - len(self._parameters)
        if not trained:
            raise ConfigError(
                f"model.freeze=[{', '.join(patterns)}] freezes all {len(self._parameters)} parameters of "
                f"{type(net).__name__}: nothing is left to train. Leave out the pattern that matches the last layer."
            )
        self._norms = []
        for path, module in norms.items():
            own = [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
            if module.training and all(map(is_frozen, own or [path])):
                self._norms.append(module)
        self.freeze()

    def freeze(self) -> None:
        for parameter in self._parameters:
            parameter.requires_grad_(False)
        for norm in self._norms:
            norm.eval()

    def release(self) -> None:
        """Train all again."""
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        for norm in self._norms:
            norm.train()

    def __str__(self) -> str:
        """ "11,176,512 parameters and 20 BatchNorm layers"."""
        parameters = f"{sum(parameter.numel() for parameter in self._parameters):,} parameters"
        return f"{parameters} and {len(self._norms)} BatchNorm layers" if self._norms else parameters
