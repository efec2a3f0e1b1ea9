"""The names of our nets, for checks that must not import torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dist_train.config.schema import ModelConfig
from dist_train.errors import ConfigError, did_you_mean
from dist_train.user_code.source_names import check_class_is_named

NETS = ("mlp", "bks", "guide", "conv", "fast", "speedrun")
_OF_TORCHVISION = re.compile(
    "alexnet|convnext|densenet|efficientnet|googlenet|inception|maxvit|mnasnet|mobilenet|regnet|resnet|resnext|"
    "shufflenet|squeezenet|swin|vgg|vit_|wide_resnet",
    re.IGNORECASE,
)


def check_own_name(config: ModelConfig) -> None:
    """Check that `model.name` is one of our nets.

    Raises:
        ConfigError: with the nearest name.
    """
    if config.name in NETS:
        return
    check_class_is_named("model.name", config.name)
    if _OF_TORCHVISION.match(config.name):
        raise ConfigError(f"model.name={config.name}: no such net. Did you mean torchvision:{config.name.lower()}?")
    where = f"Nets: {', '.join(NETS)}; torchvision:NAME, timm:NAME, package.module:Class."
    raise unknown_net(config, "", NETS, where)


def unknown_net(config: ModelConfig, prefix: str, names: Sequence[str], where: str) -> ConfigError:
    hint = did_you_mean(config.name.removeprefix(prefix), names, prefix)
    return ConfigError(f"model.name={config.name}: no such net.{hint} {where}")
