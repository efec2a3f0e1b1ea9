"""Prepared folders: the images of an image folder, decoded once into one file of pixels per split.

root/train/pixels.npy    uint8 [N, 3, S, S], memory-mapped
root/train/prepared.json what they were made from
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_train.atomic_files import read_json, write_json
from dist_train.config.data import Decoder
from dist_train.data.sets.image_folder import ImageFolder
from dist_train.data.sets.image_set import ImageSet
from dist_train.errors import DataError

PIXELS, PREPARED = "pixels.npy", "prepared.json"


def is_prepared(folder: Path) -> bool:
    """Whether `folder` holds a split of a prepared folder."""
    return (folder / PREPARED).is_file() and (folder / PIXELS).is_file()


def describe(folder: Path, split: ImageFolder) -> None:
    """Write what the pixels in `folder` were made from."""
    made_from = {
        "image_size": split.image_size, "decoder": split.decoder, "classes": split.classes, "names": split.names
    }  # fmt: skip
    write_json(folder / PREPARED, made_from)


class PreparedFolder(ImageFolder):
    """One split of a prepared folder, with the examples of the image folder that it was made from.

    All processes of a host that map the file share its memory.
    """

    def __init__(self, folder: Path, image_size: int, decoder: Decoder) -> None:
        """Raises:
        DataError: it was prepared for another image size or by another decoder, or a file is damaged.
        """
        made_from = read_json(folder / PREPARED)
        try:
            prepared = made_from["image_size"], made_from["decoder"]
            self.classes = tuple(map(str, made_from["classes"]))
            numbers = {name: number for number, name in enumerate(self.classes)}
            labels = [numbers[name.partition("/")[0]] for name in made_from["names"]]
            self.paths = [folder / name for name in made_from["names"]]
        except (KeyError, TypeError, AttributeError):
            raise DataError(f"{folder / PREPARED} is damaged. Prepare the folder again.") from None
        if prepared != (image_size, decoder):
            raise DataError(
                f"{folder} was prepared with data.image_size={prepared[0]} data.decoder={prepared[1]}, and this run "
                f"has data.image_size={image_size} data.decoder={decoder}. Set the same, or prepare the folder again: "
                f"dist-train data prepare"
            )
        self.folder, self.image_size, self.decoder = folder, image_size, decoder
        self.labels = torch.tensor(labels)
        expected = (len(labels), 3, image_size, image_size)
        if self.pixels.dtype != torch.uint8 or self.pixels.shape != expected:
            raise DataError(f"{folder / PIXELS} does not hold uint8 {list(expected)}. Prepare the folder again.")

    @cached_property
    def pixels(self) -> Tensor:
        """All images, uint8 [N, 3, S, S]. Changes of them stay in this process."""
        path = self.folder / PIXELS
        try:
            return torch.from_numpy(np.load(path, mmap_mode="c"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}. Prepare the folder again.") from None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "pixels"}  # a copy maps the file itself

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels[index], int(self.labels[index])

    def in_memory(self) -> ImageSet:
        return ImageSet(self.pixels, self.labels, self.classes, self.names)
