"""Preparation of image folders: decoding them once, for all later trainings."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dist_train.atomic_files import atomic_write
from dist_train.config.data import Decoder
from dist_train.data.sets.folder_splits import open_folders, split_folders
from dist_train.data.sets.prepared_folder import PIXELS, describe, is_prepared
from dist_train.data.sets.settings_check import check_decoder
from dist_train.errors import DataError


def prepare(
    root: Path, out: Path, image_size: int, decoder: Decoder, on_image: Callable[[int], object] = lambda _total: None
) -> int:
    """Decode the image folder `root` into the new folder `out`; return the bytes of pixels.

    `on_image`: called after each image with the number of images. After an error nothing is left at `out`.

    Raises:
        ConfigError: the decoder is not installed.
        DataError: as `load_image_folder`; `out` exists, or the disk has too little room.
    """
    check_decoder(decoder)
    if out.exists():
        raise DataError(f"{out} exists already. Name another folder, or remove it.")
    folders = split_folders(root)
    if any(map(is_prepared, folders.values())):
        raise DataError(f"{root} is a prepared folder. Name the image folder that it was made from.")
    splits = open_folders(folders, image_size, decoder)
    needed, total = sum(split.num_bytes for split in splits.values()), sum(map(len, splits.values()))
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise DataError(
            f"{total} images of 3 x {image_size} x {image_size} bytes take {needed / 1e6:,.1f} MB, and the disk of "
            f"{out.parent} has {free / 1e6:,.1f} MB free. Choose another disk or a smaller --image-size."
        )
    with atomic_write(out) as temporary:
        for name, split in splits.items():
            folder = temporary / name
            folder.mkdir(parents=True)
            shape = (len(split), 3, image_size, image_size)
            pixels = np.lib.format.open_memmap(folder / PIXELS, "w+", np.uint8, shape)
            for _ in split.decode_into(torch.from_numpy(pixels)):
                on_image(total)
            pixels.flush()
            describe(folder, split)
    return needed
