"""Image folders: root/train/CLASS/*, optionally root/val/CLASS/* and root/test/CLASS/*.

Each image, as a viewer shows it, is converted to RGB, resized to a shorter side of `image_size`, and center-cropped.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dist_train.config.data import Decoder
from dist_train.data.sets.available_memory import available_bytes, fits
from dist_train.data.sets.decoding import decode
from dist_train.data.sets.image_set import Examples, ImageSet
from dist_train.data.sets.split_choice import Choice, every_split
from dist_train.errors import DataError

_log = logging.getLogger(__name__)


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
        """Decode all images, with as many threads as this process may use (decoding releases the GIL)."""
        images = torch.empty(len(self), 3, self.image_size, self.image_size, dtype=torch.uint8)

        def fill(index: int) -> None:
            images[index] = decode(self.paths[index], self.image_size, self.decoder)

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            try:
                for _ in pool.map(fill, range(len(self))):
                    pass
            finally:
                pool.shutdown(cancel_futures=True)  # skip the rest after an invalid image
        return ImageSet(images, self.labels, self.classes, self.names)


def split_folders(root: Path, choose: Choice = every_split, root_setting: str = "data.root") -> dict[str, Path]:
    """Return the folders of the chosen splits by name: of "train", "val" and "test", where they exist.

    Raises:
        DataError: the first of them does not exist.
    """
    present = [name for name in ("train", "val", "test") if (root / name).is_dir()]
    folders = {name: root / name for name in choose(present)}
    first = next(iter(folders))
    if first not in present:
        raise DataError(
            f"There is no folder {folders[first]}. Set {root_setting} to the folder that holds {first}/CLASS/*."
        )
    return folders


def load_image_folder(
    folders: Mapping[str, Path],
    image_size: int,
    decoder: Decoder,
    resident: bool | None = None,
    ranks_per_node: int = 1,
) -> dict[str, Examples]:
    """Return the splits in `folders`, by name.

    They are decoded into memory at once if `resident` is True or, if it is None, when they take at most half of the
    free memory divided by the ranks per node.

    Raises:
        DataError: no images, splits with different classes, an image that cannot be decoded.
    """
    splits = {name: ImageFolder(folder, image_size, decoder) for name, folder in folders.items()}
    first, *others = splits
    for name in others:
        _check_classes(folders[name], splits[name].classes, splits[first].classes)
    root = folders[first].parent
    if resident is None:
        needed, free = sum(split.num_bytes for split in splits.values()), available_bytes()
        resident = fits(needed, free, ranks_per_node)
        if not resident:
            sizes = f"{needed / 1e9:.1f} GB decoded, {(free or 0) / 1e9:.1f} GB free, {ranks_per_node} ranks per node"
            _log.info("%s is streamed: %s.", root, sizes)
    if resident:
        _log.info("Decoding %d images of %s into memory.", sum(map(len, splits.values())), root)
    return {name: split.in_memory() if resident else split for name, split in splits.items()}


def _check_classes(folder: Path, classes: tuple[str, ...], expected: tuple[str, ...]) -> None:
    differences = []
    if missing := sorted(set(expected) - set(classes)):
        differences.append(f"lacks {', '.join(missing)}")
    if extra := sorted(set(classes) - set(expected)):
        differences.append(f"also has {', '.join(extra)}")
    if differences:
        raise DataError(f"{folder} {' and '.join(differences)}. All splits need the same class folders as train.")


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return the entries of a folder, sorted by name, without hidden files such as .DS_Store."""
    with os.scandir(folder) as entries:
        shown = [entry for entry in entries if not entry.name.startswith(".")]
    return sorted(shown, key=lambda entry: entry.name)  # independent of the locale and of the order on disk


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether this is a folder or a link to one. Only a link costs a round trip to a network file system."""
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and Path(entry).is_dir())
