"""How likely an epoch is to draw each training example: balanced over the classes, or by weights in a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dist_train.config.data import DataConfig
from dist_train.data.sets.image_set import Examples, locate, num_examples, stored_labels
from dist_train.errors import ConfigError, DataError


def example_weights(config: DataConfig, whole: Examples, trained_on: Tensor | None) -> Tensor | None:
    """Return the weights of the examples to train on, float64 [M]; None: an epoch visits each at most once.

    `whole` is the training set as loaded; `trained_on`, int64 [M], are those of it not held out. None: all.

    Raises:
        ConfigError: the set does not store the classes to balance.
        DataError: the file does not give each example of `whole` a weight, or all examples to train on the weight 0.
    """
    kept = slice(None) if trained_on is None else trained_on
    if config.sample_weights is not None:
        return _of_file(config.sample_weights, num_examples(whole), kept)
    return _balanced(config, whole, kept) if config.sampling == "balanced" else None


def _of_file(path: Path, num_examples: int, kept: Tensor | slice) -> Tensor:
    setting = f"data.sample_weights={path}"
    weights = _read(path.expanduser(), setting)
    if weights.shape != (num_examples,):
        raise DataError(
            f"{setting} holds numbers of shape {list(weights.shape)}, and the training set has {num_examples} "
            f"examples. Give each one number, those held out for validation included."
        )
    bad = (~((weights >= 0) & weights.isfinite())).nonzero()
    if len(bad):
        index = int(bad[0])
        raise DataError(
            f"{setting} gives example {index} the weight {weights[index]:g}. Weights are finite, 0 or more."
        )
    weights = weights[kept]
    if not weights.any():
        raise DataError(f"{setting} gives all {len(weights)} examples to train on the weight 0. Give one of them more.")
    return weights


def _read(file: Path, setting: str) -> Tensor:
    try:
        numbers = np.load(file) if file.suffix == ".npy" else file.read_text().split()
        return torch.from_numpy(np.array(numbers, dtype=np.float64))
    except Exception as error:  # numpy raises any exception for a damaged file
        reason = " ".join(str(error).split())
        raise DataError(f"{setting} cannot be read: {reason}. Give a .npy file or a text file of numbers.") from None


def _balanced(config: DataConfig, whole: Examples, kept: Tensor | slice) -> Tensor:
    labels = stored_labels(locate(whole, 0)[0])
    if labels is None or labels.shape != (num_examples(whole),):
        label = "data.bundle" if config.bundle is not None else f"data.name={config.name}"
        raise ConfigError(
            f"data.sampling=balanced needs the class of each training example, and the set of {label} has no attribute "
            f"targets or labels with one integer or string each. Add it, or set data.sample_weights=FILE."
        )
    _, classes, counts = np.unique(labels[kept], return_inverse=True, return_counts=True)
    return torch.from_numpy(1.0 / counts[classes])
