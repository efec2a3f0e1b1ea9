"""The weight of each class in cross-entropy: as given, or balanced by how often it occurs in the training set."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dist_train.config.schema import Config
from dist_train.data.sets.image_set import Examples, num_examples, stored_labels
from dist_train.errors import ConfigError


def class_weights(config: Config, train: Examples, num_classes: int | None, device: torch.device) -> Tensor | None:
    """Return the weights of `class_weights`, [K] in the default dtype on `device`; None if it is not set.

    Balanced means that class k gets N / (K x its number of examples), without those of `ignore_index`: the mean weight
    over these N examples is 1.

    Raises:
        ConfigError: the set does not store labels from 0 to K - 1, or a class has no example.
    """
    weights = config.class_weights
    if weights == "balanced":
        counts = _counts(train, num_classes, config.ignore_index)
        share = counts.sum() / np.count_nonzero(counts)
        weights = np.divide(share, counts, out=np.zeros(len(counts)), where=counts > 0).tolist()
    return None if weights is None else torch.tensor(weights, dtype=torch.get_default_dtype(), device=device)


def _counts(train: Examples, num_classes: int | None, ignored: int | None) -> npt.NDArray[np.int64]:
    """Return the number of examples of each class, [K]; 0 for the ignored one only."""
    labels = stored_labels(train)
    fits = labels is not None and labels.shape == (num_examples(train),) and labels.dtype.kind in "iu"
    labels = labels[labels != ignored] if labels is not None and fits else None
    if labels is None or labels.min(initial=0) < 0:
        raise ConfigError(
            "class_weights=balanced needs the class of each training example, and this set has no attribute targets or "
            "labels with one number from 0 on for each. Add it, or write the weights: class_weights=[1, 5, ...]."
        )
    counts = np.bincount(labels, minlength=num_classes or 0)
    missing = [label for label in np.flatnonzero(counts == 0) if label != ignored]
    if missing:
        raise ConfigError(
            f"class_weights=balanced: class {missing[0]} has none of the {len(labels)} training examples, "
            f"and its weight would be infinite. Write the weights: class_weights=[1, 5, ...]."
        )
    return counts
