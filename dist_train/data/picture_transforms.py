"""torchvision's transforms by name, applied to each example of a training set as it is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from copy import copy
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dist_train.config.augment import NamedTransform
from dist_train.data.sets.image_folder import ImageFolder
from dist_train.data.sets.image_set import Examples, ImageSet, Subset, describe_value, num_examples
from dist_train.data.sets.prepared_folder import PreparedFolder
from dist_train.distributed.devices import is_out_of_memory
from dist_train.errors import ConfigError
from dist_train.torchvision_compat import import_torchvision


def transformed(examples: Examples, named: Sequence[NamedTransform]) -> Examples:
    """Return the same examples with transforms. Those of a folder of pictures get the whole picture of each file.

    Raises:
        ConfigError: see `PictureTransforms`.
    """
    if isinstance(examples, Subset):
        return Subset(transformed(examples.whole, named), examples.indices)
    if isinstance(examples, PreparedFolder):
        raise ConfigError(
            f"data.transforms changes whole pictures, and {examples.folder} holds only squares of them. Set data.root "
            f"to the folder that it was made from, or use data.augment."
        )
    if isinstance(examples, ImageFolder):
        folder = copy(examples)
        folder.transforms = PictureTransforms(named, [folder.image_size] * 2)
        return folder
    size = list(examples.images.shape[2:]) if isinstance(examples, ImageSet) else []
    return _Transformed(examples, PictureTransforms(named, size))


class PictureTransforms:
    """Calls torchvision's transforms in turn. They draw from torch's generator, which is seeded for each example."""

    def __init__(self, named: Sequence[NamedTransform], size: list[int]) -> None:
        """`size`: [H, W], for those that need a size and are given none.

        Raises:
            ConfigError: a transform does not take its arguments.
        """
        import_torchvision()
        module = import_module("torchvision.transforms.v2")
        pairs = [pair for each in named for pair in each.items()]
        self._transforms = [_make(getattr(module, name), arguments, size) for name, arguments in pairs]

    def __call__(self, picture: Tensor) -> Tensor:
        """Transform uint8 [C, H, W]. Height and width may change.

        Raises:
            ConfigError: a transform fails, or the result is not uint8 with as many channels.
        """
        made: Any = picture
        for transform in self._transforms:
            try:
                made = transform(made)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                raise ConfigError(
                    f"data.transforms: {type(transform).__name__} fails on {describe_value(made)}: "
                    f"{' '.join(str(error).split()).rstrip('.')}. Change its arguments, or remove it."
                ) from error
        if not isinstance(made, Tensor) or made.dtype != torch.uint8 or made.shape[:-2] != picture.shape[:-2]:
            raise ConfigError(
                f"data.transforms make {describe_value(made)} of {describe_value(picture)}. Keep the type and the "
                f"number of channels."
            )
        return made


def _make(transform: type, arguments: dict[str, Any], size: list[int]) -> Any:
    parameters = inspect.signature(transform).parameters
    needs_size = "size" in parameters and parameters["size"].default is inspect.Parameter.empty
    given = {"size": size} | arguments if needs_size and size else arguments
    try:
        return transform(**given)
    except Exception as error:  # torchvision checks arguments in many ways
        raise ConfigError(
            f"data.transforms: {transform.__name__} does not take {arguments or 'no arguments'}: "
            f"{' '.join(str(error).split())}. Its arguments: {', '.join(parameters)}."
        ) from error


class _Transformed(Subset):
    """All examples of a set of pixels, transformed."""

    def __init__(self, whole: Any, transforms: PictureTransforms) -> None:
        super().__init__(whole, range(num_examples(whole)))
        self.yields_pixels = True
        self._transforms = transforms

    def __getitem__(self, index: int) -> Any:
        picture, *others = super().__getitem__(index)
        made = self._transforms(picture)
        if made.shape != picture.shape:
            raise ConfigError(
                f"data.transforms make {describe_value(made)} of {describe_value(picture)}. End them with a transform "
                f"that gives each image its size again, such as RandomCrop."
            )
        return made, *others
