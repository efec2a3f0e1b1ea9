"""The data sets known by name: their file names and locations in torchvision's layout."""

from __future__ import annotations

import shlex
import string
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from dist_train.config.paths import default_data_root
from dist_train.errors import ConfigError

DIGITS = tuple(string.digits)
_IDX_PARTS = ("images-idx3-ubyte", "labels-idx1-ubyte")
# In bymerge and balanced, capital letters that look like their lowercase form share its class.
_MERGED = tuple(sorted(set(string.digits + string.ascii_letters) - set("cijklmopsuvwxyz")))
EMNIST_CLASSES = {
    "balanced": _MERGED,
    "byclass": tuple(sorted(string.digits + string.ascii_letters)),
    "bymerge": _MERGED,
    "digits": DIGITS,
    "letters": ("N/A", *string.ascii_lowercase),  # the files count letters from 1, so class 0 stays empty
    "mnist": DIGITS,
}


@dataclass(frozen=True)
class NamedSet:
    class_name: str  # in torchvision.datasets
    folder: str  # below the data root
    train_files: tuple[str, ...]
    test_files: tuple[str, ...]
    archives: tuple[str, ...]  # the downloads of torchvision, below the data root
    classes: tuple[str, ...] | None = None  # of sets in IDX files; the others store them

    def files(self, root: Path, split: str | None = None) -> list[Path]:
        """Return the required files; for emnist those of `split`, or of all splits."""
        splits = [split] if split or self.class_name != "EMNIST" else list(EMNIST_CLASSES)
        names = self.train_files + self.test_files
        return [root / self.folder / name.format(split=part) for part in splits for name in names]

    def is_present(self, root: Path, split: str | None = None) -> bool:
        return all(path.is_file() for path in self.files(root, split))


def _idx(class_name: str, classes: tuple[str, ...]) -> NamedSet:
    train, test = (tuple(f"{half}-{part}" for part in _IDX_PARTS) for half in ("train", "t10k"))
    folder = f"{class_name}/raw"
    return NamedSet(class_name, folder, train, test, tuple(f"{folder}/{name}.gz" for name in train + test), classes)


_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_EMNIST_TRAIN = tuple(f"emnist-{{split}}-train-{part}" for part in _IDX_PARTS)
_EMNIST_TEST = tuple(f"emnist-{{split}}-test-{part}" for part in _IDX_PARTS)
_CIFAR10_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_SVHN_FILES = ("train_32x32.mat", "test_32x32.mat")
SETS = {
    "mnist": _idx("MNIST", DIGITS),
    "fashion_mnist": _idx("FashionMNIST", _FASHION),
    "kmnist": _idx("KMNIST", ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")),
    "emnist": NamedSet("EMNIST", "EMNIST/raw", _EMNIST_TRAIN, _EMNIST_TEST, ("EMNIST/raw/gzip.zip",)),
    "cifar10": NamedSet(
        "CIFAR10",
        "cifar-10-batches-py",
        _CIFAR10_BATCHES,
        ("test_batch", "batches.meta"),
        ("cifar-10-python.tar.gz",),
    ),
    "cifar100": NamedSet("CIFAR100", "cifar-100-python", ("train",), ("test", "meta"), ("cifar-100-python.tar.gz",)),
    "svhn": NamedSet("SVHN", "", _SVHN_FILES[:1], _SVHN_FILES[1:], _SVHN_FILES),
}


def check_packages(name: str) -> None:
    """Check that the packages which read the set are installed.

    Raises:
        ConfigError
    """
    if name == "svhn" and find_spec("scipy") is None:
        raise ConfigError('data.name=svhn needs scipy, which is not installed. pip install "dist-train[svhn]"')


def fetch_command(name: str, root: Path) -> str:
    """Return the command that downloads the set to `root` on a machine with network access."""
    prefix = "" if root == default_data_root() else f"DIST_TRAIN_DATA_DIR={shlex.quote(str(root))} "
    return f"{prefix}dist-train data fetch {name}"


class Available(NamedTuple):
    name: str
    present: bool  # can be used without a network
    path: Path  # the folder of its files, which may not exist yet
    note: str


def available_sets(root: Path | None = None) -> list[Available]:
    """Return every set known by name, for `dist-train data ls`."""
    root = root or default_data_root()
    rows = []
    for name, known in SETS.items():
        present, note = known.is_present(root), ""
        if name == "mnist":
            present, note = True, "bundled with the package"
        elif name == "emnist":
            splits = [split for split in EMNIST_CLASSES if known.is_present(root, split)]
            present, note = bool(splits), f"data.split: {', '.join(splits or EMNIST_CLASSES)}"
        elif name == "svhn":
            note = "needs scipy"
        rows.append(Available(name, present, root / known.folder, note))
    return rows
