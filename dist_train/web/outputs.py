"""Files of a run to take away: one by one, and all of them as one archive that is made while it is sent."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from zipfile import ZIP_STORED, ZipFile, ZipInfo

from dist_train.atomic_files import open_regular
from dist_train.runs.directory import RunDir

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_CHUNK = 1 << 18  # bytes; a slow reader keeps a few of them waiting


def file_of(run_dir: RunDir, relative: str) -> Path | None:
    """Return a regular file inside a run directory; None if there is none, or if a link leads to it or out of it."""
    try:
        root = run_dir.path.resolve(strict=True)
        path = root / relative  # elsewhere if `relative` is absolute
        inside = path.is_relative_to(root) and path.resolve(strict=True) == path
        return path if inside and path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, a circle of links
        return None


def files_in(run_dir: RunDir, folder: str, suffix: str) -> dict[str, Path]:
    """Return the files of a folder of a run by name, sorted. Links, and names that are no text, are left out."""
    names = sorted(path.name for path in (run_dir.path / folder).glob(f"*{suffix}") if is_shown(path.name))
    return {name: path for name in names if (path := file_of(run_dir, f"{folder}/{name}")) is not None}


def list_files(run_dir: RunDir) -> list[tuple[str, int]]:
    """Return the files of a run by their path in it, with their sizes in bytes.

    Links, hidden files, and names that are no text are left out.
    """
    found = []
    for folder, folders, names in os.walk(run_dir.path):
        folders[:] = sorted(name for name in folders if is_shown(name))
        for name in sorted(names):
            path = Path(folder) / name
            if is_shown(name) and not path.is_symlink() and path.is_file():
                with suppress(OSError):  # replaced meanwhile
                    found.append((path.relative_to(run_dir.path).as_posix(), path.stat().st_size))
    return found


def stream_zip(run_dir: RunDir, *, with_checkpoints: bool) -> Iterator[bytes]:
    """Yield the bytes of an archive of a run's files. Nothing is written to the disk."""
    found = (relative for relative, _ in list_files(run_dir))
    wanted = (relative for relative in found if with_checkpoints or not relative.startswith("checkpoints/"))
    # Files may have been pruned meanwhile, or be links now.
    paths = ((relative, path) for relative in wanted if (path := file_of(run_dir, relative)) is not None)
    yield from _stream((f"{run_dir.path.name}/{relative}", path) for relative, path in paths)


def stream_folder(folder: Path) -> Iterator[bytes]:
    """Yield the bytes of an archive of all files in a folder, hidden ones too. Nothing is written to the disk."""

    def files() -> Iterator[tuple[str, Path]]:
        for parent, folders, names in os.walk(folder):
            folders.sort()
            for path in (Path(parent, name) for name in sorted(names)):
                if path.is_file() and not path.is_symlink():
                    yield path.relative_to(folder).as_posix(), path

    yield from _stream(files())


def _stream(files: Iterable[tuple[str, Path]]) -> Iterator[bytes]:
    """Yield the bytes of an archive of files, given with their names in it."""
    out = _Buffer()
    with ZipFile(out, "w", ZIP_STORED) as archive:  # weights and pictures do not compress
        for name, path in files:
            with suppress(FileNotFoundError), open_regular(path) as source:
                info = ZipInfo.from_file(path, name, strict_timestamps=False)
                with archive.open(info, "w", force_zip64=True) as target:
                    for chunk in chunks_of(source):
                        target.write(chunk)
                        yield out.take()
    yield out.take()


def chunks_of(file: BinaryIO) -> Iterator[bytes]:
    """Yield the content of an open file, and close it."""
    with file:
        while chunk := file.read(_CHUNK):
            yield chunk


def is_shown(name: str) -> bool:
    """Whether the page shows a file or folder of this name: it is not hidden, and UTF-8, as each address is."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return not name.startswith(".")


class _Buffer(io.RawIOBase):
    """A file that cannot seek: zipfile then writes sizes and checksums behind each member."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, content: ReadableBuffer, /) -> int:
        self._parts.append(bytes(content))
        return len(self._parts[-1])

    def take(self) -> bytes:
        content, self._parts = b"".join(self._parts), []
        return content
