"""Loads the splits of a run from the `data` settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_train.config.data import DataConfig
from dist_train.data.child_process import run_in_child
from dist_train.data.example_weights import example_weights
from dist_train.data.fingerprint import Fingerprint, checksum, fingerprint_split
from dist_train.data.picture_transforms import transformed
from dist_train.data.resident_set import make_resident, tensors_of, unchanging_bytes
from dist_train.data.sets.available_memory import available_bytes, fits
from dist_train.data.sets.examples_check import check_pixels, check_validation_set
from dist_train.data.sets.image_folder import ImageFolder
from dist_train.data.sets.image_set import (
    Examples,
    ImageSet,
    Subset,
    classes_of,
    example_at,
    num_examples,
    subset_of,
    yields_pixels,
)
from dist_train.data.sets.settings_check import check_settings
from dist_train.data.sets.source import Source
from dist_train.distributed.rng import derive_seed
from dist_train.errors import ConfigError, DataError
from dist_train.user_code.importing import wrap_user_errors


@dataclass(frozen=True)
class DataSummary:
    """Properties of the data sets as loaded, before validation examples are held out."""

    image_shape: tuple[int, int, int] | None  # [C, H, W] of the first training example, None if it is not an image
    num_classes: int | None  # None if the training set does not define it, as is `classes`
    classes: list[str] | None
    fingerprints: Mapping[str, Fingerprint]  # by split
    unchanging_bytes: int | None  # of one training example, if the set is streamed and data.resident=true is a choice


@dataclass(frozen=True, eq=False)
class Splits:
    train: Examples
    val: Examples | None
    test: Examples | None  # the same object as `val` if validation uses the test split
    val_source: str  # origin of `val`, for the report
    summary: DataSummary
    sample_weights: Tensor | None = None  # float64 [num_examples(train)]; None: an epoch visits each at most once
    resident_bytes: int | None = None  # what data.resident=true would take, where it is not set but possible

    @property
    def choice_by_test(self) -> str:
        """What a choice by `val` is made by, with the fix, if that is also what is reported at the end; else ""."""
        if self.val is None or self.val is not self.test:
            return ""
        held_out = max(1, min(5000, num_examples(self.train) // 10))
        return f"the test split that is reported at the end; data.val_examples={held_out} holds out others to choose by"

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
        found = self.summary.fingerprints
        if self.sample_weights is None:
            return found
        return {**found, "train": found["train"] | {"sample weights": checksum(self.sample_weights.numpy())}}


def check_data_exists(config: DataConfig) -> None:
    """Check that the data set exists, as far as possible without reading it; user code as in `check_object`.

    Raises:
        ConfigError, DataError, UserCodeError: see `load_splits`.
    """
    check_settings(config)
    for source in (Source.of_training(config), Source.of_validation(config)):
        if source is not None:
            source.check()


def load_splits(config: DataConfig, seed: int, ranks_per_node: int = 1) -> Splits:
    """Load training, validation and test examples, the same on every rank.

    Raises:
        ConfigError: settings do not apply to the data set or contradict it.
        DataError: data is missing, damaged or unavailable.
        UserCodeError: the user's data set raises an error.
    """
    check_settings(config)
    found, name_of_val, own_validation = _load(config, ranks_per_node)
    user_splits = [split for split, examples in found.items() if not isinstance(examples, (ImageSet, ImageFolder))]
    # If workers will be forked, a user's set stays unused here, even its length: using it may open a file.
    in_child = user_splits if config.num_workers else []
    may_be_resident = config.resident is None and not config.transforms
    arguments = found, seed, own_validation, may_be_resident
    summary = run_in_child(_summarise, *arguments) if in_child else _summarise(*arguments)
    found |= {split: Subset(found[split], range(summary.fingerprints[split]["count"])) for split in in_child}
    check_pixels(config, found["train"], summary.image_shape)
    if config.transforms:
        transformed(found["train"], config.transforms)  # raises where their arguments are wrong
    train, val, test, val_source, trained_on = _add_validation(config, seed, found, name_of_val)
    weights = example_weights(config, found["train"], trained_on)
    if config.resident:
        streamed = {id(each): each for each in (train, val, test) if each is not None}  # val and test may be one
        kept = {key: _in_memory(each, config, seed, ranks_per_node) for key, each in streamed.items()}
        train, val, test = kept[id(train)], kept.get(id(val)), kept.get(id(test))
    return Splits(train, val, test, val_source, summary, weights, _resident_bytes(summary, ranks_per_node))


def _load(config: DataConfig, ranks_per_node: int) -> tuple[dict[str, Examples], str, str]:
    """Return the splits, the name of `val`, and the settings of a validation set of its own, "" if there is none."""
    source, validation = Source.of_training(config), Source.of_validation(config)
    found = source.load(ranks_per_node)
    if validation is None:
        return found, source.name_of("val"), ""
    [(split, found["val"])] = validation.load(ranks_per_node).items()
    name = validation.name_of(split)
    if split == "train" and validation.place == source.place:
        raise ConfigError(
            f"{validation} names the training set itself, {name}. Name another folder or loader, or set "
            f"data.val_examples=1000 instead."
        )
    return found, f"{name} ({validation})", str(validation)


def _summarise(found: Mapping[str, Examples], seed: int, own_validation: str, may_be_resident: bool) -> DataSummary:
    """`own_validation`: as `_load` returns it. `may_be_resident`: whether the settings leave that open."""
    fingerprints = {}
    for split, examples in found.items():
        with wrap_user_errors(f"The {split} set", "cannot be read"):
            if not num_examples(examples):
                raise DataError(f"The {split} set holds no examples.")
            fingerprints[split] = fingerprint_split(examples, seed)
    train = found["train"]
    with wrap_user_errors("The train set", "cannot be read"):
        classes, num_classes = classes_of(train)
        image_shape = _image_shape(train)
    if own_validation:
        with wrap_user_errors("The validation set", "cannot be read"):
            check_validation_set(train, found["val"], own_validation)
    example_bytes = unchanging_bytes(train, seed) if may_be_resident else None
    return DataSummary(image_shape, num_classes, classes, fingerprints, example_bytes)


def _image_shape(train: Examples) -> tuple[int, int, int] | None:
    example = example_at(train, 0)
    image = example[0] if isinstance(example, (tuple, list)) and example else None
    if not isinstance(image, Tensor) or image.ndim != 3:
        return None
    channels, height, width = image.shape
    return channels, height, width


def _in_memory(examples: Examples, config: DataConfig, seed: int, ranks_per_node: int) -> Examples:
    if tensors_of(examples) is not None:
        return examples
    return make_resident(examples, seed, config.num_workers, ranks_per_node)


def _resident_bytes(summary: DataSummary, ranks_per_node: int) -> int | None:
    """Return about how many bytes all splits would take with data.resident=true; None if it is no choice."""
    if summary.unchanging_bytes is None:
        return None
    needed = summary.unchanging_bytes * sum(each["count"] for each in summary.fingerprints.values())
    return needed if fits(needed, available_bytes(), ranks_per_node) else None


_Divided = tuple[Examples, Examples | None, Examples | None, str, Tensor | None]


def _add_validation(config: DataConfig, seed: int, found: dict[str, Examples], name_of_val: str) -> _Divided:
    """Return the splits, the origin of `val`, and which examples `train` keeps of the whole set; None: all."""
    train, val, test = found["train"], found.get("val"), found.get("test")
    held_out, total = config.val_examples, num_examples(train)
    if not held_out:
        if val is not None:
            return train, val, test, name_of_val, None
        return train, test, test, "none" if test is None else "the test split", None
    if val is not None:
        raise ConfigError(
            f"data.val_examples={held_out}, but a validation set exists already: {name_of_val}. "
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
    trained_on = shuffled[held_out:].sort().values
    return subset_of(train, trained_on), val, test, f"{held_out} examples held out of train", trained_on
