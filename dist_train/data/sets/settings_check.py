"""Validation of the `data` settings against each other and against the data set."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dist_train.config.schema import DataConfig
from dist_train.data.sets.catalog import EMNIST_CLASSES, SETS
from dist_train.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from dist_train.data.sets.image_set import Examples


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


def check_pixels(config: DataConfig, train: Examples, image_shape: tuple[int, int, int] | None) -> None:
    """Check that the pixel settings fit the images [C, H, W]; sets without pixels (most user code) have their own
    transforms.

    Raises:
        ConfigError
    """
    from dist_train.data.sets.image_set import yields_pixels  # imports torch, which `check_settings` does not need

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
