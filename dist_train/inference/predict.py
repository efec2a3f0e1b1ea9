"""Predictions of a trained net for image files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dist_train.data.sets.decoding import decode
from dist_train.data.sets.settings_check import check_decoder
from dist_train.inference.trained_net import TrainedNet, logits_of
from dist_train.models.tasks.confusion import class_names

_BATCH_SIZE = 256  # images


@dataclass(frozen=True)
class Prediction:
    image: Path
    classes: list[str]  # the most probable first; of a regression empty
    values: list[float]  # their probabilities, or the numbers of a regression


def predict(saved: TrainedNet, images: Sequence[Path], *, invert: bool = False, count: int = 3) -> Iterator[Prediction]:
    """Predict the classes, labels or numbers of each image, converted to the data set's channels and size.

    `invert` swaps dark and bright; `count`: of the most probable ones.

    Raises:
        ConfigError: the decoder of the run's images is not installed.
        DataError: a file is not a valid image.
        UserCodeError: the net does not return logits [B, K].
    """
    decoder = saved.config.data.decoder
    check_decoder(decoder)
    for start in range(0, len(images), _BATCH_SIZE):
        paths = images[start : start + _BATCH_SIZE]
        pixels = torch.stack([decode(path, saved.image_size, decoder, saved.in_channels) for path in paths])
        logits = logits_of(saved, 255 - pixels if invert else pixels)
        if saved.config.task == "regression":
            yield from (Prediction(path, [], row.tolist()) for path, row in zip(paths, logits, strict=True))
            continue
        names = class_names(saved.classes, logits.shape[1])
        probabilities = logits.softmax(dim=1) if saved.config.task == "classification" else logits.sigmoid()
        best = probabilities.topk(min(count, logits.shape[1]))
        for path, indices, values in zip(paths, best.indices, best.values, strict=True):
            yield Prediction(path, [names[index] for index in indices.tolist()], values.tolist())
