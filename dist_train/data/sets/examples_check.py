"""Validation of data sets against the `data` settings and against each other."""

from __future__ import annotations

from dist_train.config.augment import AugmentConfig
from dist_train.config.data import DataConfig
from dist_train.data.sets.image_set import (
    Examples,
    classes_of,
    describe_value,
    example_at,
    num_examples,
    yields_pixels,
)
from dist_train.errors import ConfigError, DataError


def check_validation_set(train: Examples, val: Examples, settings: str) -> None:
    """Check that the validation set which `settings` name has the inputs and the classes of the training set.

    Where the training inputs differ in size among themselves, so may those of the validation set.

    Raises:
        DataError
    """
    label = f"The validation set of {settings}"
    inputs = {_describe_input(train, index) for index in (0, num_examples(train) - 1)}
    found = _describe_input(val, 0)
    if len(inputs) == 1 and found not in inputs:
        raise DataError(f"{label} has inputs {found}, the training set {inputs.pop()}. Convert both in the same way.")
    (names, count), (expected_names, expected_count) = classes_of(val), classes_of(train)
    if count is not None and expected_count is not None and count != expected_count:
        raise DataError(f"{label} has {count} classes, the training set {expected_count}. Give both the same classes.")
    for index, (name, expected) in enumerate(zip(names or (), expected_names or (), strict=False)):
        if name != expected:
            raise DataError(
                f"{label} has {name} as class {index}, the training set {expected}. Give both the same classes in the "
                f"same order."
            )


def _describe_input(examples: Examples, index: int) -> str:
    example = example_at(examples, index)
    return describe_value(example[0] if isinstance(example, (tuple, list)) and example else example)


def check_pixels(config: DataConfig, train: Examples, image_shape: tuple[int, int, int] | None) -> None:
    """Check that the pixel settings fit the images [C, H, W]; sets without pixels (most user code) have their own
    transforms.

    Raises:
        ConfigError
    """
    for setting in ("normalize", "augment", "transforms", "tta"):
        if getattr(config, setting) and not yields_pixels(train):
            label = "data.bundle" if config.bundle is not None else f"data.name={config.name}"
            raise ConfigError(
                f"data.{setting} does not apply to {label}, which has its own transforms. Remove data.{setting}."
            )
    channels, *sides = image_shape or (0, 0, 0)
    if config.augment is not None:
        _check_augment(config.augment, channels, min(sides))
    if config.normalize is None:
        return
    given = len(config.normalize.mean)
    if channels != given:
        raise ConfigError(
            f"data.normalize has {given} channels, the images of data.name={config.name} have {channels}. "
            f"Set {channels} numbers for mean and for std."
        )


def _check_augment(config: AugmentConfig, channels: int, side: int) -> None:
    for setting, pixels, effect in (
        ("shift", config.shift, "shifts images of {side} pixels out of the frame"),
        ("cutout", config.cutout, "blacks out whole images of {side} pixels"),
    ):
        if pixels and pixels >= side:
            raise ConfigError(
                f"data.augment.{setting}={pixels} {effect.format(side=side)}. Set it to less than {side}."
            )
    if config.saturation and channels != 3:
        raise ConfigError(
            f"data.augment.saturation={config.saturation:g} changes the colours of images with 3 channels, and these "
            f"have {channels}. Remove it."
        )
