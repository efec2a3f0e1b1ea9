"""The MNIST bundled with the package, unpacked once into the data folder in torchvision's layout.

MNIST: Y. LeCun, C. Cortes, C. Burges; CC BY-SA 3.0.
"""

from __future__ import annotations

import hashlib
import json
import logging
import lzma
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from dist_train.atomic_files import atomic_write, remove_leftovers
from dist_train.data.sets.data_folder import disk_errors, locked
from dist_train.errors import DataError

_log = logging.getLogger(__name__)
_PACKED = Path(__file__).with_name("mnist")
_CHUNK_BYTES = 1 << 20
MARKER_NAME = ".verified.json"  # {file: [size, mtime_ns]} of the files whose MD5 was verified


class _FileInfo(NamedTuple):
    size: int
    md5: str


FILES = {
    "train-images-idx3-ubyte": _FileInfo(47_040_016, "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": _FileInfo(60_008, "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": _FileInfo(7_840_016, "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": _FileInfo(10_008, "27ae3e4e09519cfbb04c329615203637"),
}


def unpack_mnist(root: Path) -> Path:
    """Return the folder `root/MNIST/raw` with the four verified files; unpack those that are missing.

    A complete folder is only read, so it may be on a read-only disk. A file with other content is renamed to
    `*.damaged` with a warning.

    Raises:
        DataError: a file must be written and cannot be.
    """
    folder = root / "MNIST" / "raw"
    if not _invalid_files(folder):
        return folder
    with locked(root), disk_errors(root, needed_bytes=sum(file.size for file in FILES.values())):
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        for name in _invalid_files(folder):  # check again: another process may have been faster
            _unpack(name, folder)
        _invalid_files(folder)
    return folder


def _invalid_files(folder: Path) -> list[str]:
    """Return the files that are missing or differ from the bundled ones.

    A file is hashed once: the marker is then trusted while its size and modification time stay the same.
    """
    known = _read_marker(folder)
    stamps = {name: _stamp(folder / name) for name in FILES}  # before hashing, so that a later change is detected
    verified = {
        name: stamp
        for name, stamp in stamps.items()
        if stamp and stamp[0] == FILES[name].size and (stamp == known.get(name) or _md5_matches(folder / name))
    }
    if verified and verified != known:
        # On a read-only disk the marker cannot be written, and each start hashes again, which takes 0.1 s.
        with suppress(OSError), atomic_write(folder / MARKER_NAME) as aside:
            aside.write_text(json.dumps(verified))
    return [name for name in FILES if name not in verified]


def _read_marker(folder: Path) -> dict[str, list[int]]:
    try:
        marker = json.loads((folder / MARKER_NAME).read_bytes())
    except (OSError, ValueError):
        return {}
    return marker if isinstance(marker, dict) else {}


def _stamp(path: Path) -> list[int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def _md5_matches(path: Path) -> bool:
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError:
        return False
    return digest.hexdigest() == FILES[path.name].md5


def _unpack(name: str, folder: Path) -> None:
    target = folder / name
    if target.exists():
        aside = target.with_name(f"{name}.damaged")
        target.replace(aside)
        _log.warning("%s is not the expected MNIST file. It was restored; the old file is now %s.", target, aside.name)
    packed = _PACKED / f"{name}.xz"
    digest = hashlib.md5(usedforsecurity=False)
    with atomic_write(target) as aside, aside.open("wb") as file:
        try:
            with lzma.open(packed) as source:
                while chunk := source.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    file.write(chunk)
        except (FileNotFoundError, EOFError, lzma.LZMAError) as error:
            raise DataError(f"{packed} of the installed package is damaged ({error}). Reinstall it.") from None
        if digest.hexdigest() != FILES[name].md5:
            raise DataError(f"{packed} of the installed package has other content. Reinstall it.")
    _log.info("Unpacked %s.", target)
