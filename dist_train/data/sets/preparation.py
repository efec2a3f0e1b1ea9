"""Preparation of image folders: decoding them once, for all later trainings."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dist_train.atomic_files import atomic_write
from dist_train.config.data import Decoder
from dist_train.data.sets.folder_splits import open_folders, splits_in
from dist_train.data.sets.image_folder import ImageFolder
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
        DataError: as `load_image_folder`; `out` exists or cannot be written, or the disk has too little room.
    """
    check_decoder(decoder)
    if os.path.lexists(out):
        raise DataError(f"{out} exists already. Name another folder, or remove it.")
    folders = {name: root / name for name in splits_in(root)}
    if not folders:
        raise DataError(f"{root} has no folder train, val or test. Name the folder that holds train/CLASS/*.")
    if any(map(is_prepared, folders.values())):
        raise DataError(f"{root} is a prepared folder. Name the image folder that it was made from.")
    splits = open_folders(folders, image_size, decoder)
    needed, total = sum(split.num_bytes for split in splits.values()), sum(map(len, splits.values()))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(out) as temporary:
            mapped = {name: _allocate(temporary / name, split) for name, split in splits.items()}
            for name, split in splits.items():
                for _ in split.decode_into(torch.from_numpy(mapped[name])):
                    on_image(total)
                mapped[name].flush()
    except OSError as error:
        raise DataError(
            f"{out} cannot be written: {error.strerror or error}. {total} images of 3 x {image_size} x {image_size} "
            f"bytes take {needed / 1e6:,.1f} MB. Choose another disk or a smaller --image-size."
        ) from None
    return needed


def _allocate(folder: Path, split: ImageFolder) -> np.memmap[tuple[int, ...], np.dtype[np.uint8]]:
    """Return a new file of pixels, mapped. Its room is taken at once: without any, a write to it would end the process.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    folder.mkdir(parents=True)
    describe(folder, split)
    shape = (len(split), 3, split.image_size, split.image_size)
    mapped: np.memmap[tuple[int, ...], np.dtype[np.uint8]] = np.lib.format.open_memmap(
        folder / PIXELS, "w+", np.uint8, shape
    )
    with (folder / PIXELS).open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return mapped
