"""The names of our nets, for checks that must not import torch."""

from __future__ import annotations

from collections.abc import Sequence

from dist_train.config.schema import ModelConfig
from dist_train.errors import ConfigError, did_you_mean

NETS = ("mlp", "bks", "guide", "conv", "fast", "speedrun")


def check_own_name(config: ModelConfig) -> None:
    """Check that `model.name` is one of our nets.

    Raises:
        ConfigError: with the nearest name.
    """
    if config.name not in NETS:
        where = f"Nets: {', '.join(NETS)}; torchvision:NAME, timm:NAME, package.module:Class."
        raise unknown_net(config, "", NETS, where)


def unknown_net(config: ModelConfig, prefix: str, names: Sequence[str], where: str) -> ConfigError:
    hint = did_you_mean(config.name.removeprefix(prefix), names, prefix)
    return ConfigError(f"model.name={config.name}: no such net.{hint} {where}")
