"""Loads the data sets known by name into memory."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from dist_train.config.paths import default_data_root
from dist_train.data.sets.bundled_mnist import unpack_mnist
from dist_train.data.sets.catalog import DIGITS, EMNIST_CLASSES, SETS, check_packages, fetch_command
from dist_train.data.sets.download import fetch
from dist_train.data.sets.idx import read_idx_set
from dist_train.data.sets.image_set import ImageSet
from dist_train.errors import DataError


def load_named(name: str, root: Path, split: str | None) -> tuple[ImageSet, ImageSet]:
    """Return the training and test set. Missing files are unpacked (mnist) or downloaded.

    Raises:
        DataError: files are missing and cannot be obtained, or are damaged.
        ConfigError: the set needs a package that is not installed.
    """
    known = SETS[name]
    check_packages(name)
    if name == "mnist":
        try:
            unpack_mnist(root)
        except DataError:
            if os.environ.get("DIST_TRAIN_DATA_DIR") or root != default_data_root():
                raise  # the folder was chosen explicitly
            with TemporaryDirectory(prefix="dist_train-") as aside:  # each start unpacks it again
                return load_named(name, Path(aside), split)
    elif not known.is_present(root, split):
        fetch(name, root, split)
    classes = EMNIST_CLASSES[split] if name == "emnist" and split else known.classes
    if classes is None:
        return _load_with_torchvision(name, root, train=True), _load_with_torchvision(name, root, train=False)
    # EMNIST's files store each image transposed. It stays transposed, as in torchvision and elsewhere.
    train_images, train_labels, test_images, test_labels = known.files(root, split)
    return read_idx_set(train_images, train_labels, classes), read_idx_set(test_images, test_labels, classes)


def _load_with_torchvision(name: str, root: Path, train: bool) -> ImageSet:
    from dist_train.torchvision_compat import import_torchvision

    known = SETS[name]
    build = getattr(import_torchvision().datasets, known.class_name)
    half: dict[str, Any] = {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
    try:
        dataset = build(root, **half)
    except Exception as error:  # from torchvision, or any that a damaged pickle or .mat file causes
        folder = root / known.folder
        raise DataError(
            f"{name} in {folder} cannot be read ({type(error).__name__}: {' '.join(str(error).split())}). "
            f"Delete its files there, then run: {fetch_command(name, root)}"
        ) from None
    if name == "svhn":  # already [N, C, H, W]
        return ImageSet(torch.from_numpy(dataset.data).contiguous(), torch.from_numpy(dataset.labels), DIGITS)
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()  # from [N, H, W, C]
    return ImageSet(images, torch.tensor(dataset.targets), tuple(dataset.classes))
