"""What a folder or an archive holds: number of files, bytes, and a digest that is the same for equal contents."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dist_train.errors import LibraryError

_SKIPPED = {"__pycache__", ".git"}  # change without a change of the code


@dataclass(frozen=True)
class Limits:
    bytes: int  # of all files together, unpacked
    entries: int  # files and folders
    advice: str  # what to do where there is more

    @property
    def directory_bytes(self) -> int:
        """The largest directory of an archive: it is read into memory whole. Names have 80 letters on average."""
        return max(2**20, 128 * self.entries)


CODE = Limits(256 * 2**20, 2000, "Pack only code; put data into data.root.")


@dataclass(frozen=True)
class Contents:
    files: int
    bytes: int
    digest: str  # sha256, in hex


class ContentsDigest:
    """Sums up the files of a folder or an archive, given in the order of their names."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._files = self._bytes = 0

    def add(self, name: str, size: int, digest: bytes = b"") -> None:
        """`digest`: of the content; empty to cover only name and size."""
        self._digest.update(f"{name}\0{size}\0".encode(errors="surrogateescape") + digest)
        self._files += 1
        self._bytes += size

    def contents(self) -> Contents:
        return Contents(self._files, self._bytes, self._digest.hexdigest())


def contents_of_code(folder: Path) -> Contents:
    """Read all files of a folder of code.

    Raises:
        LibraryError: it holds more than code does.
    """
    found = ContentsDigest()
    for number, (name, size) in enumerate(_files(folder), start=1):
        if number > CODE.entries or size > CODE.bytes:
            raise LibraryError(
                f"{folder} holds more than {CODE.entries} files, or one of more than {CODE.bytes // 2**20} MiB: it is "
                "no folder of code. Name the folder with the code alone."
            )
        with (folder / name).open("rb") as file:
            found.add(name, size, hashlib.file_digest(file, "sha256").digest())
    return found.contents()


def contents_of_data(folder: Path) -> Contents:
    """List all files of a folder of data. The digest covers their names and sizes: the files are not read."""
    found = ContentsDigest()
    for name, size in _files(folder):
        found.add(name, size)
    return found.contents()


def _files(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield the name and size of each file in a folder, sorted by name."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED]
        for name in names:
            path = Path(parent, name)
            if path.is_file():  # no link to nowhere
                found.append((path.relative_to(folder).as_posix(), path.stat().st_size))
    yield from sorted(found)
