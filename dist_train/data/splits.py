"""From the `data` settings to the splits of a run."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_train.config import DataConfig, default_data_root
from dist_train.data.image_folder import load_image_folder
from dist_train.data.image_set import Examples, ImageSet, example_at, num_examples, part_of
from dist_train.data.named import load_named
from dist_train.data.pixels import yields_pixels
from dist_train.data.settings import check_pixels, check_settings
from dist_train.data.user import check_map_style, load_user_sets
from dist_train.errors import ConfigError
from dist_train.seeding import derive_seed


@dataclass(frozen=True, eq=False)
class Splits:
    train: Examples
    val: Examples | None
    test: Examples | None  # the same object as `val` where validation uses the test split
    val_source: str  # for the report: where `val` comes from

    @property
    def known(self) -> dict[str, int | None]:
        """What a net may need to know of the data; None where the set does not tell."""
        return {"in_channels": self.in_channels, "num_classes": self.num_classes, "image_size": self.image_size}

    @property
    def facts(self) -> dict[str, Any]:
        """What a net needs to know to be used without the data."""
        classes = getattr(self.train, "classes", None)
        named = list(map(str, classes)) if isinstance(classes, (list, tuple)) else None
        return {**self.known, "classes": named, "pixels": yields_pixels(self.train)}

    @property
    def in_channels(self) -> int | None:
        return self._image_shape[0] if self._image_shape else None

    @property
    def image_size(self) -> int | None:
        """Pixels per side; None if the images are not square."""
        shape = self._image_shape
        return shape[1] if shape and shape[1] == shape[2] else None

    @property
    def num_classes(self) -> int | None:
        stated = getattr(self.train, "num_classes", None)
        if isinstance(stated, int):
            return stated
        classes = getattr(self.train, "classes", None)
        return len(classes) if isinstance(classes, Sized) else None

    @cached_property
    def _image_shape(self) -> tuple[int, int, int] | None:
        """[C, H, W] of the first training example, None if that is not an image."""
        if isinstance(self.train, ImageSet):
            image: Any = self.train.images[0]
        else:
            example = example_at(self.train, 0)
            image = example[0] if isinstance(example, (tuple, list)) and example else None
        if not isinstance(image, Tensor) or image.ndim != 3:
            return None
        channels, height, width = image.shape
        return channels, height, width


def load_splits(config: DataConfig, seed: int, ranks_per_node: int = 1) -> Splits:
    """Training, validation and test examples, the same on every rank.

    Raises:
        ConfigError: settings that do not belong to the data set, or are at odds with it.
        DataError: data missing, damaged, or not to be had.
        UserCodeError: the user's data set fails.
    """
    check_settings(config)
    root = (config.root or default_data_root()).expanduser().absolute()
    found = _load(config, root, ranks_per_node)
    check_pixels(config, found["train"])
    return _with_validation(config, seed, found)


def _load(config: DataConfig, root: Path, ranks_per_node: int) -> dict[str, Examples]:
    if config.bundle is not None:
        from dist_train.bundle import load_dataset_bundle

        train, val = load_dataset_bundle(config.bundle, root)
        found = {"train": check_map_style(train, f"The training set of {config.bundle}")}
        if val is not None:
            found["val"] = check_map_style(val, f"The validation set of {config.bundle}")
        return found
    if ":" in config.name:
        return load_user_sets(config.name, root, config.args)
    if config.image_size is not None:
        return load_image_folder(root, config.image_size, config.resident, ranks_per_node)
    train_set, test_set = load_named(config.name, root, config.split)
    return {"train": train_set, "test": test_set}


def _with_validation(config: DataConfig, seed: int, found: dict[str, Examples]) -> Splits:
    train, val, test = found["train"], found.get("val"), found.get("test")
    held_out, total = config.val_examples, num_examples(train)
    if not held_out:
        if val is not None:
            return Splits(train, val, test, _name_of_val(config, val))
        return Splits(train, test, test, "none" if test is None else "the test split")
    if val is not None:
        raise ConfigError(
            f"data.val_examples={held_out}, but there is a validation set already: {_name_of_val(config, val)}. "
            "Set data.val_examples=0."
        )
    if held_out >= total:
        raise ConfigError(
            f"data.val_examples={held_out} of {total} training examples leaves {total - held_out} to train on. "
            f"Set data.val_examples to less than {total}."
        )
    # The generator is ours alone, so that every rank and every resume draws the same examples.
    shuffled = torch.randperm(total, generator=torch.Generator().manual_seed(derive_seed(seed, "val")))
    val = part_of(train, shuffled[:held_out].sort().values)
    train = part_of(train, shuffled[held_out:].sort().values)
    return Splits(train, val, test, f"{held_out} examples held out of train")


def _name_of_val(config: DataConfig, val: Examples) -> str:
    if config.bundle is not None:
        return type(val).__name__
    return "val/" if config.image_size is not None else f"{config.name}(split='val')"
