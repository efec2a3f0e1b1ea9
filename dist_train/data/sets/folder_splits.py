"""The splits of a data root with one folder for each: root/train, optionally root/val and root/test."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from dist_train.config.data import Decoder
from dist_train.data.sets.available_memory import available_bytes, fits
from dist_train.data.sets.image_folder import ImageFolder
from dist_train.data.sets.image_set import Examples
from dist_train.data.sets.prepared_folder import PreparedFolder, is_prepared
from dist_train.data.sets.split_choice import Choice, every_split
from dist_train.errors import DataError

_log = logging.getLogger(__name__)


def splits_in(root: Path) -> list[str]:
    """Return the names of the splits that `root` holds."""
    return [name for name in ("train", "val", "test") if (root / name).is_dir()]


def split_folders(root: Path, choose: Choice = every_split, root_setting: str = "data.root") -> dict[str, Path]:
    """Return the folders of the chosen splits by name: of "train", "val" and "test", where they exist.

    Raises:
        DataError: the first of them does not exist.
    """
    present = splits_in(root)
    folders = {name: root / name for name in choose(present)}
    first = next(iter(folders))
    if first not in present:
        raise DataError(
            f"There is no folder {folders[first]}. Set {root_setting} to the folder that holds {first}/CLASS/*."
        )
    return folders


def open_folders(folders: Mapping[str, Path], image_size: int, decoder: Decoder) -> dict[str, ImageFolder]:
    """Return the splits in `folders`, by name, without decoding images.

    Raises:
        DataError: no images, splits with different classes, or prepared in another way.
    """
    splits = {
        name: (PreparedFolder if is_prepared(folder) else ImageFolder)(folder, image_size, decoder)
        for name, folder in folders.items()
    }
    first, *others = splits
    for name in others:
        _check_classes(folders[name], splits[name].classes, splits[first].classes)
    return splits


def load_image_folder(
    folders: Mapping[str, Path],
    image_size: int,
    decoder: Decoder,
    resident: bool | None = None,
    ranks_per_node: int = 1,
) -> dict[str, Examples]:
    """Return the splits in `folders`, by name.

    They are decoded into memory at once if `resident` is True or, if it is None, when they take at most half of the
    free memory divided by the ranks per node; prepared ones, which the ranks share, at most half of it.

    Raises:
        DataError: no images, splits with different classes, an image that cannot be decoded.
    """
    splits = open_folders(folders, image_size, decoder)
    root = next(iter(folders.values())).parent
    prepared = all(isinstance(split, PreparedFolder) for split in splits.values())
    if resident is None:
        ranks_per_node = 1 if prepared else ranks_per_node
        needed, free = sum(split.num_bytes for split in splits.values()), available_bytes()
        resident = fits(needed, free, ranks_per_node)
        if not resident:
            sizes = f"{needed / 1e9:.1f} GB decoded, {(free or 0) / 1e9:.1f} GB free, {ranks_per_node} ranks per node"
            _log.info("%s is streamed: %s.", root, sizes)
    if resident and not prepared:
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
