"""Image folders: root/train/CLASS/*, optionally root/val/CLASS/* and root/test/CLASS/*.

Each image, as a viewer shows it, is converted to RGB, resized to a shorter side of `image_size`, and center-cropped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dist_train.config.data import Decoder
from dist_train.data.sets.decoding import decode
from dist_train.data.sets.image_set import ImageSet
from dist_train.errors import DataError

_SUBMITTED = 4096  # images at once


class ImageFolder(Dataset[Any]):
    """One split whose images are decoded on access: (uint8 [3, S, S], label)."""

    yields_pixels = True  # uint8, normalised on the device

    def __init__(self, folder: Path, image_size: int, decoder: Decoder) -> None:
        class_folders = [folder / entry.name for entry in _entries(folder) if _is_folder(entry)]
        if not class_folders:
            raise DataError(f"{folder} has no class folders. Put the images into {folder}/CLASS/.")
        self.classes = tuple(path.name for path in class_folders)
        self.image_size = image_size
        self.decoder = decoder
        self.paths: list[Path] = []
        labels: list[int] = []
        for label, class_folder in enumerate(class_folders):
            files = _entries(class_folder)
            if not files:
                raise DataError(f"{class_folder} contains no images. Fill it, or remove it from every split.")
            nested = next((entry for entry in files if _is_folder(entry)), None)
            if nested:
                raise DataError(f"{nested.path} is a folder. Images must be directly in {class_folder}.")
            self.paths += [class_folder / entry.name for entry in files]
            labels += [label] * len(files)
        self.labels = torch.tensor(labels)  # int64 [N]
        self.transforms: Callable[[Tensor], Tensor] | None = None  # of the whole picture, uint8 [3, H, W]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = decode(self.paths[index], self.image_size, self.decoder, transforms=self.transforms)
        return image, int(self.labels[index])

    @property
    def names(self) -> tuple[str, ...]:
        """CLASS/FILE of each image."""
        labels = self.labels.tolist()
        return tuple(f"{self.classes[label]}/{path.name}" for label, path in zip(labels, self.paths, strict=True))

    @property
    def num_bytes(self) -> int:
        return len(self) * 3 * self.image_size**2

    def in_memory(self) -> ImageSet:
        """Return the whole split in memory."""
        images = torch.empty(len(self), 3, self.image_size, self.image_size, dtype=torch.uint8)
        for _ in self.decode_into(images):
            pass
        return ImageSet(images, self.labels, self.classes, self.names)

    def decode_into(self, images: Tensor) -> Iterator[None]:
        """Decode all images into uint8 [N, 3, S, S] and yield after each one.

        Uses as many threads as this process may: decoding releases the GIL.
        """

        def fill(index: int) -> None:
            images[index] = decode(self.paths[index], self.image_size, self.decoder)

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            try:
                for start in range(0, len(self), _SUBMITTED):  # a waiting call takes 2 kB
                    yield from pool.map(fill, range(start, min(start + _SUBMITTED, len(self))))
            finally:
                pool.shutdown(cancel_futures=True)  # skip the rest after an invalid image


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return the entries of a folder, sorted by name, without hidden files such as .DS_Store."""
    with os.scandir(folder) as entries:
        shown = [entry for entry in entries if not entry.name.startswith(".")]
    return sorted(shown, key=lambda entry: entry.name)  # independent of the locale and of the order on disk


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether this is a folder or a link to one. Only a link costs a round trip to a network file system."""
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and Path(entry).is_dir())
