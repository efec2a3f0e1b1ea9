"""Folders of pictures: root/train/CLASS/*, and root/val/CLASS/* or root/test/CLASS/* beside it.

Each picture, as a viewer shows it, becomes RGB, its shorter side `image_size`, and the middle square is kept.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.utils.data import Dataset

from dist_train.data.sets.image_set import Examples, ImageSet
from dist_train.data.sets.memory import available_bytes
from dist_train.errors import DataError

_log = logging.getLogger(__name__)
_TURNS = {  # by EXIF orientation; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DEEP_MODES = ("I", "F")  # more than 8 bits a pixel: PIL would cut the values off, not scale them


class ImageFolder(Dataset[Any]):
    """One split, each picture decoded when it is asked for: (uint8 [3, S, S], label)."""

    yields_pixels = True  # uint8, to be normalised on the device

    def __init__(self, folder: Path, image_size: int) -> None:
        class_folders = _sorted(path for path in _entries(folder) if path.is_dir())
        if not class_folders:
            raise DataError(f"{folder} has no class folders. Put the pictures into {folder}/CLASS/.")
        self.classes = tuple(path.name for path in class_folders)
        self.image_size = image_size
        self.paths: list[Path] = []
        labels: list[int] = []
        for label, class_folder in enumerate(class_folders):
            files = _sorted(_entries(class_folder))
            if not files:
                raise DataError(f"{class_folder} holds no pictures. Fill it, or remove it from every split.")
            nested = next((path for path in files if path.is_dir()), None)
            if nested:
                raise DataError(f"{nested} is a folder. Pictures must lie directly in {class_folder}.")
            self.paths += files
            labels += [label] * len(files)
        self.labels = torch.tensor(labels)  # int64 [N]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return decode(self.paths[index], self.image_size), int(self.labels[index])

    @property
    def names(self) -> tuple[str, ...]:
        """CLASS/FILE of each picture."""
        labels = self.labels.tolist()
        return tuple(f"{self.classes[label]}/{path.name}" for label, path in zip(labels, self.paths, strict=True))

    @property
    def num_bytes(self) -> int:
        return len(self) * 3 * self.image_size**2

    def in_memory(self) -> ImageSet:
        """All of it, decoded by as many threads as this process may use (PIL works outside of Python's lock)."""
        images = torch.empty(len(self), 3, self.image_size, self.image_size, dtype=torch.uint8)

        def fill(index: int) -> None:
            images[index] = decode(self.paths[index], self.image_size)

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            try:
                for _ in pool.map(fill, range(len(self))):
                    pass
            finally:
                pool.shutdown(cancel_futures=True)  # after a bad picture the rest need not be read
        return ImageSet(images, self.labels, self.classes, self.names)


def check_folder(root: Path) -> None:
    """
    Raises:
        DataError: there is nothing to train on.
    """
    if not (root / "train").is_dir():
        raise DataError(f"There is no folder {root / 'train'}. Set data.root to the folder that holds train/CLASS/*.")


def load_image_folder(
    root: Path, image_size: int, resident: bool | None = None, ranks_per_node: int = 1
) -> dict[str, Examples]:
    """The splits that are there, by name: "train", and "val" and "test" where their folders exist.

    Decoded at once into memory if `resident` says so; where it is None, if this takes at most half of the memory
    that is free, divided among the ranks of a node.

    Raises:
        DataError: no train folder, no pictures, splits with different classes, a picture that cannot be decoded.
    """
    check_folder(root)
    found = {name: root / name for name in ("train", "val", "test") if (root / name).is_dir()}
    splits = {name: ImageFolder(folder, image_size) for name, folder in found.items()}
    for name, split in splits.items():
        _check_classes(root / name, split.classes, splits["train"].classes)
    if resident is None:
        needed, free = sum(split.num_bytes for split in splits.values()), available_bytes()
        resident = free is None or needed <= free // 2 // ranks_per_node
        if not resident:
            sizes = f"{needed / 1e9:.1f} GB decoded, {(free or 0) / 1e9:.1f} GB free, {ranks_per_node} ranks per node"
            _log.info("%s is streamed: %s.", root, sizes)
    if resident:
        _log.info("decoding %d pictures of %s into memory", sum(map(len, splits.values())), root)
    return {name: split.in_memory() if resident else split for name, split in splits.items()}


def decode(path: Path, image_size: int, channels: int = 3) -> Tensor:
    """One picture, uint8 [C, S, S] of 3 channels or, in shades of grey, of 1.

    Raises:
        DataError: PIL cannot read it, or would lose what is in it.
    """
    try:
        with Image.open(path) as picture:
            if picture.mode.split(";")[0] in _DEEP_MODES:
                raise DataError(f"{path} has more than 8 bits per pixel (mode {picture.mode}). Convert it to 8 bits.")
            converted = _as_shown(picture).convert("RGB" if channels == 3 else "L")
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"There is no picture {path}.") from None
    except Exception as error:  # PIL raises many kinds, by format
        raise DataError(f"{path} is not a picture that can be decoded: {error}. Mend or remove it.") from None
    short = min(converted.size)
    width, height = (image_size * side // short for side in converted.size)
    resized = converted.resize((width, height), Image.Resampling.BILINEAR)  # PIL smooths when it shrinks
    left, top = round((width - image_size) / 2), round((height - image_size) / 2)
    square = resized.crop((left, top, left + image_size, top + image_size))
    pixels = torch.from_numpy(np.array(square)).view(image_size, image_size, channels)
    return pixels.permute(2, 0, 1).contiguous()


def _as_shown(picture: Image.Image) -> Image.Image:
    """As a viewer shows it: upright, and white where it is transparent."""
    picture.load()
    turn = None
    with suppress(Exception):  # viewers show a picture with broken EXIF data too
        turn = _TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    if picture.has_transparency_data:
        ink = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", ink.size, "white"), ink)
    return picture if turn is None else picture.transpose(turn)


def _check_classes(folder: Path, classes: tuple[str, ...], wanted: tuple[str, ...]) -> None:
    differences = []
    if missing := sorted(set(wanted) - set(classes)):
        differences.append(f"lacks {', '.join(missing)}")
    if strange := sorted(set(classes) - set(wanted)):
        differences.append(f"has {', '.join(strange)} besides")
    if differences:
        raise DataError(f"{folder} {' and '.join(differences)}. All splits need the same class folders as train.")


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder; hidden files (.DS_Store and the like) are nobody's pictures."""
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def _sorted(paths: Any) -> list[Path]:
    return sorted(paths, key=lambda path: path.name)  # not by locale or by the order on the disk: the same everywhere
