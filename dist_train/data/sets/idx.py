"""A reader of the IDX files of MNIST and similar sets, without torchvision, whose import takes a second."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dist_train.data.sets.image_set import ImageSet
from dist_train.errors import DataError

_UINT8 = 0x08  # the only element type that image sets use


def read_idx(path: Path, ndim: int) -> Tensor:
    """Read the array in one file, uint8 with `ndim` dimensions.

    Layout: two zero bytes, the element type, the number of dimensions, each dimension as a big-endian uint32, the data.

    Raises:
        DataError: the file cannot be read, has another format, or its length does not match its header.
    """
    header_bytes = 4 + 4 * ndim
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(header_bytes)
            magic = header[:4]
            if magic != bytes((0, 0, _UINT8, ndim)):
                raise DataError(
                    f"{path} starts with {magic.hex(' ') or 'nothing'}, but an IDX file of {ndim}-dimensional uint8 "
                    f"starts with 00 00 08 {ndim:02x}. Delete it: it is downloaded or unpacked again."
                )
            shape = struct.unpack(f">{ndim}I", header[4:]) if len(header) == header_bytes else None
            expected = header_bytes + (math.prod(shape) if shape else 0)
            if shape is None or size != expected:
                raise DataError(
                    f"{path} is damaged: {expected} bytes expected, {size} found. "
                    "Delete it: it is downloaded or unpacked again."
                )
            return torch.from_numpy(np.fromfile(file, dtype=np.uint8)).reshape(shape)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None


def read_idx_set(images_path: Path, labels_path: Path, classes: tuple[str, ...]) -> ImageSet:
    """Read greyscale images [N, 1, H, W] and their labels from a pair of files.

    Raises:
        DataError: see `read_idx`, or the two files do not match.
    """
    images = read_idx(images_path, ndim=3)  # [N, H, W]
    labels = read_idx(labels_path, ndim=1)  # [N]
    try:
        return ImageSet(images.unsqueeze(1), labels.long(), classes)
    except DataError as error:
        raise DataError(f"{images_path} and {labels_path.name} do not match: {error}") from None
