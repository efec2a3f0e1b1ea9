"""Validation of the `data` settings against each other and against the data set."""

from __future__ import annotations

from dist_train.config.schema import DataConfig
from dist_train.data.sets.catalog import EMNIST_CLASSES, SETS
from dist_train.data.sets.image_set import (
    Examples,
    classes_of,
    describe_value,
    example_at,
    num_examples,
    yields_pixels,
)
from dist_train.errors import ConfigError, DataError, did_you_mean


def check_settings(config: DataConfig) -> None:
    """Check that the settings name a data set and apply to it. Reads no data.

    Raises:
        ConfigError
    """
    name, is_user = config.name, ":" in config.name
    if config.bundle is not None and name != DataConfig.model_fields["name"].default:
        raise ConfigError(f"data.name={name} and data.bundle={config.bundle} are both set. Keep one of them.")
    kind = "bundle" if config.bundle is not None else "user" if is_user else name
    if kind not in ("bundle", "user", "image_folder", *SETS):
        raise ConfigError(
            f"data.name={name} is not a known data set.{did_you_mean(name, ['image_folder', *SETS])} "
            f"Known: {', '.join(SETS)}, image_folder. For your own, set data.name=package.module:Name."
        )
    label = "data.bundle" if kind == "bundle" else f"data.name={name}"
    if config.val_bundle is not None and kind != "bundle":
        raise ConfigError(
            f"data.val_bundle={config.val_bundle} goes with a data.bundle, and the training set is data.name={name}. "
            f"Remove data.val_bundle, or set data.bundle."
        )
    for setting, path in (("val_bundle", config.val_bundle), ("val_root", config.val_root)):
        if path is not None and config.val_examples:
            raise ConfigError(
                f"data.val_examples={config.val_examples} holds out training examples, and data.{setting}={path} is a "
                f"validation set of its own. Set data.val_examples=0, or remove data.{setting}."
            )
    for setting, value, owner, belongs in (
        ("split", config.split, "emnist", kind == "emnist"),
        ("image_size", config.image_size, "image_folder", kind == "image_folder"),
        ("args", config.args or None, "package.module:Name", kind == "user"),
    ):
        if value is not None and not belongs:
            raise ConfigError(f"data.{setting}={value} applies to {owner}, not to {label}. Remove data.{setting}.")
    if kind == "emnist" and config.split not in EMNIST_CLASSES:
        had = f"has no data.split={config.split}" if config.split else "needs data.split"
        raise ConfigError(f"data.name=emnist {had}. Set data.split to one of: {', '.join(EMNIST_CLASSES)}.")
    if kind == "image_folder" and config.image_size is None:
        raise ConfigError("data.name=image_folder needs data.image_size, the pixels per side. Set data.image_size=64.")


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
    for setting in ("normalize", "augment"):
        if getattr(config, setting) is not None and not yields_pixels(train):
            label = "data.bundle" if config.bundle is not None else f"data.name={config.name}"
            raise ConfigError(
                f"data.{setting} does not apply to {label}, which has its own transforms. Remove data.{setting}."
            )
    channels, *sides = image_shape or (0, 0, 0)
    if config.augment is not None and config.augment.shift >= (side := min(sides)):
        raise ConfigError(
            f"data.augment.shift={config.augment.shift} shifts images of {side} pixels out of the frame. "
            f"Set it to less than {side}."
        )
    if config.normalize is None:
        return
    given = len(config.normalize.mean)
    if channels != given:
        raise ConfigError(
            f"data.normalize has {given} channels, the images of data.name={config.name} have {channels}. "
            f"Set {channels} numbers for mean and for std."
        )
