"""Loads the splits of a run from the `data` settings."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_train.config.paths import default_data_root
from dist_train.config.schema import DataConfig
from dist_train.data.child_process import run_in_child
from dist_train.data.fingerprint import Fingerprint, fingerprint_split
from dist_train.data.sets.bundle import load_dataset_bundle
from dist_train.data.sets.image_folder import ImageFolder, check_folder, load_image_folder
from dist_train.data.sets.image_set import (
    Examples,
    ImageSet,
    Subset,
    example_at,
    num_examples,
    subset_of,
    yields_pixels,
)
from dist_train.data.sets.named_sets import load_named
from dist_train.data.sets.settings_check import check_pixels, check_settings
from dist_train.data.sets.user_sets import check_map_style, load_user_sets
from dist_train.distributed.rng import derive_seed
from dist_train.errors import ConfigError, DataError
from dist_train.user_code.bundles import check_bundle
from dist_train.user_code.importing import check_object, wrap_user_errors


@dataclass(frozen=True)
class DataSummary:
    """Properties of the data sets as loaded, before validation examples are held out."""

    image_shape: tuple[int, int, int] | None  # [C, H, W] of the first training example, None if it is not an image
    num_classes: int | None  # None if the training set does not define it, as is `classes`
    classes: list[str] | None
    fingerprints: Mapping[str, Fingerprint]  # by split


@dataclass(frozen=True, eq=False)
class Splits:
    train: Examples
    val: Examples | None
    test: Examples | None  # the same object as `val` if validation uses the test split
    val_source: str  # origin of `val`, for the report
    summary: DataSummary

    @property
    def input_spec(self) -> dict[str, int | None]:
        """The data properties a net may need; None where the set does not define one."""
        return {"in_channels": self.in_channels, "num_classes": self.num_classes, "image_size": self.image_size}

    @property
    def description(self) -> dict[str, Any]:
        """The data properties needed to use a net without the data."""
        return {**self.input_spec, "classes": self.summary.classes, "pixels": yields_pixels(self.train)}

    @property
    def in_channels(self) -> int | None:
        return self.summary.image_shape[0] if self.summary.image_shape else None

    @property
    def image_size(self) -> int | None:
        """Pixels per side; None if the images are not square."""
        shape = self.summary.image_shape
        return shape[1] if shape and shape[1] == shape[2] else None

    @property
    def num_classes(self) -> int | None:
        return self.summary.num_classes

    @property
    def fingerprints(self) -> Mapping[str, Fingerprint]:
        """The fingerprint of each split."""
        return self.summary.fingerprints


def check_data_exists(config: DataConfig) -> None:
    """Check that the data set exists, as far as possible without reading it; user code as in `check_object`.

    Raises:
        ConfigError, DataError, UserCodeError: see `load_splits`.
    """
    check_settings(config)
    if config.bundle is not None:
        check_bundle(config.bundle, "bks_dataset.py", "UserDataset", "data.bundle")
    elif ":" in config.name:
        check_object(config.name)
    elif config.image_size is not None:
        check_folder(_root(config))


def _root(config: DataConfig) -> Path:
    return (config.root or default_data_root()).expanduser().absolute()


def load_splits(config: DataConfig, seed: int, ranks_per_node: int = 1) -> Splits:
    """Load training, validation and test examples, the same on every rank.

    Raises:
        ConfigError: settings do not apply to the data set or contradict it.
        DataError: data is missing, damaged or unavailable.
        UserCodeError: the user's data set raises an error.
    """
    check_settings(config)
    found = _load(config, _root(config), ranks_per_node)
    user_splits = [split for split, examples in found.items() if not isinstance(examples, (ImageSet, ImageFolder))]
    # If workers will be forked, a user's set stays unused here, even its length: using it may open a file.
    in_child = user_splits if config.num_workers else []
    summary = run_in_child(_summarise, found, seed) if in_child else _summarise(found, seed)
    found |= {split: Subset(found[split], range(summary.fingerprints[split]["count"])) for split in in_child}
    check_pixels(config, found["train"], summary.image_shape)
    return Splits(*_add_validation(config, seed, found), summary)


def _summarise(found: Mapping[str, Examples], seed: int) -> DataSummary:
    fingerprints = {}
    for split, examples in found.items():
        with wrap_user_errors(f"The {split} set", "cannot be read"):
            if not num_examples(examples):
                raise DataError(f"The {split} set holds no examples.")
            fingerprints[split] = fingerprint_split(examples, seed)
    train = found["train"]
    with wrap_user_errors("The train set", "cannot be read"):
        classes, num_classes = getattr(train, "classes", None), getattr(train, "num_classes", None)
        counted = len(classes) if isinstance(classes, Sized) else None
        return DataSummary(
            image_shape=_image_shape(train),
            num_classes=num_classes if isinstance(num_classes, int) else counted,
            classes=list(map(str, classes)) if isinstance(classes, (list, tuple)) else None,
            fingerprints=fingerprints,
        )


def _image_shape(train: Examples) -> tuple[int, int, int] | None:
    example = example_at(train, 0)
    image = example[0] if isinstance(example, (tuple, list)) and example else None
    if not isinstance(image, Tensor) or image.ndim != 3:
        return None
    channels, height, width = image.shape
    return channels, height, width


def _load(config: DataConfig, root: Path, ranks_per_node: int) -> dict[str, Examples]:
    if config.bundle is not None:
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


_SplitsAndSource = tuple[Examples, Examples | None, Examples | None, str]


def _add_validation(config: DataConfig, seed: int, found: dict[str, Examples]) -> _SplitsAndSource:
    """Return the splits and the origin of `val`."""
    train, val, test = found["train"], found.get("val"), found.get("test")
    held_out, total = config.val_examples, num_examples(train)
    if not held_out:
        if val is not None:
            return train, val, test, _name_of_val(config)
        return train, test, test, "none" if test is None else "the test split"
    if val is not None:
        raise ConfigError(
            f"data.val_examples={held_out}, but a validation set exists already: {_name_of_val(config)}. "
            "Set data.val_examples=0."
        )
    if held_out >= total:
        raise ConfigError(
            f"data.val_examples={held_out} of {total} training examples leaves {total - held_out} to train on. "
            f"Set data.val_examples to less than {total}."
        )
    # A generator of its own, so that every rank and every resume draws the same examples.
    shuffled = torch.randperm(total, generator=torch.Generator().manual_seed(derive_seed(seed, "val")))
    val = subset_of(train, shuffled[:held_out].sort().values)
    train = subset_of(train, shuffled[held_out:].sort().values)
    return train, val, test, f"{held_out} examples held out of train"


def _name_of_val(config: DataConfig) -> str:
    if config.bundle is not None:
        return "UserValDataset"
    return "val/" if config.image_size is not None else f"{config.name}(split='val')"
