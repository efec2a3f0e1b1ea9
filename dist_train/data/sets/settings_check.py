"""Validation of the `data` settings against each other, before any data or torch is loaded."""

from __future__ import annotations

import os
from importlib.util import find_spec

from dist_train.config.data import DataConfig, Decoder
from dist_train.data.sets.catalog import EMNIST_CLASSES, SETS
from dist_train.errors import ConfigError, did_you_mean
from dist_train.user_code.source_names import check_class_is_named


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
        check_class_is_named("data.name", name)
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
    if config.transforms and config.resident:
        raise ConfigError(
            "data.resident=true keeps images on the device as they are, and data.transforms changes them each time "
            "they are loaded. Remove one of them."
        )
    _check_sampling(config)
    for setting, value, owner, belongs in (
        ("split", config.split, "emnist", kind == "emnist"),
        ("image_size", config.image_size, "image_folder", kind == "image_folder"),
        ("decoder", "simplejpeg" if config.decoder == "simplejpeg" else None, "image_folder", kind == "image_folder"),
        ("args", config.args or None, "package.module:Name", kind == "user"),
    ):
        if value is not None and not belongs:
            raise ConfigError(f"data.{setting}={value} applies to {owner}, not to {label}. Remove data.{setting}.")
    if kind == "emnist" and config.split not in EMNIST_CLASSES:
        had = f"has no data.split={config.split}" if config.split else "needs data.split"
        raise ConfigError(f"data.name=emnist {had}. Set data.split to one of: {', '.join(EMNIST_CLASSES)}.")
    check_decoder(config.decoder)
    if kind == "image_folder" and config.image_size is None:
        raise ConfigError("data.name=image_folder needs data.image_size, the pixels per side. Set data.image_size=64.")


def check_decoder(decoder: Decoder) -> None:
    """Check that the packages which decode images are installed.

    Raises:
        ConfigError
    """
    if decoder == "simplejpeg" and find_spec("simplejpeg") is None:
        raise ConfigError("data.decoder=simplejpeg needs simplejpeg: pip install 'dist-train[jpeg]'.")


def _check_sampling(config: DataConfig) -> None:
    path = config.sample_weights
    if path is None:
        return
    if config.sampling != "shuffled":
        raise ConfigError(
            f"data.sampling={config.sampling} and data.sample_weights={path} both say how often an example is drawn. "
            f"Keep one of them."
        )
    if not os.path.isfile(os.path.expanduser(path)):  # noqa: PTH111,PTH113 - a Path may raise
        raise ConfigError(f"data.sample_weights={path}: no such file. Give the path of a .npy or text file.")
