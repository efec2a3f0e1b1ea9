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

    Balanced means that class k gets N / (K x its number of examples): the mean weight over the N examples is 1.

    Raises:
        ConfigError: the set does not store labels from 0 to K - 1, or a class has no example.
    """
    weights = config.class_weights
    if weights == "balanced":
        counts = _counts(train, num_classes)
        weights = (counts.sum() / (len(counts) * counts)).tolist()
    return None if weights is None else torch.tensor(weights, dtype=torch.get_default_dtype(), device=device)


def _counts(train: Examples, num_classes: int | None) -> npt.NDArray[np.int64]:
    labels = stored_labels(train)
    if labels is None or labels.shape != (num_examples(train),) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise ConfigError(
            "class_weights=balanced needs the class of each training example, and this set has no attribute targets or "
            "labels with one number from 0 on for each. Add it, or write the weights: class_weights=[1, 5, ...]."
        )
    counts = np.bincount(labels, minlength=num_classes or 0)
    if not counts.all():
        raise ConfigError(
            f"class_weights=balanced: class {int(np.argmin(counts))} has none of the {len(labels)} training examples, "
            f"and its weight would be infinite. Write the weights: class_weights=[1, 5, ...]."
        )
    return counts
