"""The weights that torchvision publishes, by the names that it gives them (`model.weights`). Nothing is downloaded."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

from dist_train.errors import ConfigError, did_you_mean
from dist_train.torchvision_compat import import_torchvision


def is_published(name: Path) -> bool:
    """Whether it is a name such as ResNet18_Weights.IMAGENET1K_V1."""
    return re.fullmatch(r"\w+_Weights\.\w+", str(name)) is not None


def published_file(name: Path) -> Path:
    """Return the file with these weights in the cache of torch.hub. Imports torchvision.

    Raises:
        ConfigError: there are no such weights, or they are not in the cache.
    """
    models = import_torchvision().models
    import torch.hub

    try:
        url = models.get_weight(str(name)).url
    except (ValueError, KeyError):
        known = [str(each) for model in models.list_models() for each in models.get_model_weights(model)]
        raise ConfigError(
            f"model.weights={name}: torchvision has no such weights.{did_you_mean(str(name), known)} See "
            f"https://pytorch.org/vision/stable/models.html."
        ) from None
    file = Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(url).path).name)
    if not file.is_file():
        raise ConfigError(
            f"model.weights={name}: there is no {file}. Download {url} where there is a network, and put it there; "
            f"TORCH_HOME sets another cache."
        )
    return file
