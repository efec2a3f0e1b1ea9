"""Safe unpacking of a zip: of user code into the cache folder, once for each content, and of what is uploaded."""

from __future__ import annotations

import hashlib
import lzma
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from dist_train.atomic_files import atomic_write
from dist_train.config.paths import default_data_root
from dist_train.errors import UserCodeError
from dist_train.user_code.contents import CODE, Contents, ContentsDigest, Limits

_CHUNK = 2**20
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # devices of Windows, with any suffix
_DAMAGED = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, NotImplementedError, RuntimeError,
    ValueError, OverflowError,
)  # fmt: skip
Progress = Callable[[int, int], object]  # called with the bytes that are written, and all


def unpack_archive(archive: Path, label: str) -> Path:
    """Unpack the zip `archive` of code and return its folder, which is named by a digest of the zip's bytes.

    Ranks may call this at the same time: each unpacks its own copy, and the first rename wins.

    Raises:
        UserCodeError: `archive` is not a zip, is damaged, or has unsafe entries.
    """
    bundles = default_data_root() / "bundles"
    try:
        if archive.stat().st_size > CODE.bytes:
            raise _too_big(label, CODE)
        with archive.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:32]
        folder = bundles / digest
        if folder.is_dir():
            return folder
        bundles.mkdir(parents=True, exist_ok=True)
        try:
            with atomic_write(folder) as temporary:
                unpack(archive, temporary, label, CODE)
        except OSError:
            if not folder.is_dir():  # it exists if another rank was faster; the contents are the same
                raise
    except OSError as error:
        fix = "Set DIST_TRAIN_DATA_DIR to a writable folder, or give a folder instead of a zip."
        raise UserCodeError(f"{label} cannot be unpacked into {bundles}: {error}. {fix}") from error
    return folder


def unpack(archive: Path, folder: Path, label: str, limits: Limits, progress: Progress = lambda *_: None) -> Contents:
    """Unpack the zip `archive` into the new folder `folder`.

    Nothing is written before all names are known to be safe. The size of the directory is read and its entries are
    counted first: Python's zipfile needs 0.5 kB for each.

    Raises:
        UserCodeError: `archive` is not a zip, is damaged, is larger than `limits`, or has unsafe entries.
        OSError: it cannot be read, or not be written.
    """
    with _readable(label), archive.open("rb") as file:
        _check_directory(file, label, limits)
        with zipfile.ZipFile(file) as bundle:
            entries = sorted(bundle.infolist(), key=lambda entry: entry.filename)
            _check_entries(entries, label, limits)
            folder.mkdir()
            return _extract(bundle, entries, folder, label, limits, progress)


@contextmanager
def _readable(label: str) -> Iterator[None]:
    """Turn what zipfile raises for damaged archives into a UserCodeError."""
    try:
        yield
    except MemoryError:
        raise UserCodeError(
            f"{label} needs more memory than unpacking may take. Pack it again with fewer files."
        ) from None
    except (*_DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk; that of a damaged bz2 stream has no number
        raise UserCodeError(f"{label} is not a readable zip: {error}. Pack it again, or give a folder.") from error


def _extract(
    bundle: zipfile.ZipFile, entries: Sequence[zipfile.ZipInfo], folder: Path, label: str, limits: Limits,
    progress: Progress,
) -> Contents:  # fmt: skip
    total, written = sum(entry.file_size for entry in entries), 0
    contents = ContentsDigest()
    for entry in entries:
        target = folder / entry.filename
        (target if entry.is_dir() else target.parent).mkdir(parents=True, exist_ok=True)
        if entry.is_dir():
            continue
        digest, size = hashlib.sha256(), 0
        with bundle.open(entry) as source, target.open("xb") as file:
            while chunk := source.read(_CHUNK):
                size += len(chunk)
                if written + size > limits.bytes:  # counted while unpacking: the sizes in the directory may be false
                    raise _too_big(label, limits)
                file.write(chunk)
                digest.update(chunk)
                progress(written + size, total)
        written += size
        contents.add(entry.filename, size, digest.digest())
    return contents.contents()


# --- what is checked before ------------------------------------------------------------------------------------------

_END, _END_64, _LOCATOR_64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")


def _check_directory(file: BinaryIO, label: str, limits: Limits) -> None:
    """Refuse a directory that is too large, before zipfile reads it. Each entry in it has a mark, whatever it says."""
    end, size = _find_directory(file)
    if size > limits.directory_bytes:
        most = f"{limits.directory_bytes / 2**20:.0f} MiB"
        raise UserCodeError(f"{label} has a directory of {size / 2**20:.0f} MiB, more than {most}. {limits.advice}")
    file.seek(max(0, end - size))
    if (count := file.read(size).count(b"PK\x01\x02")) > limits.entries:
        raise _too_many(label, count, limits)


def _find_directory(file: BinaryIO) -> tuple[int, int]:
    """Return where the directory of an archive ends, and its size in bytes, from the record at the archive's end."""
    start = file.seek(max(0, file.seek(0, 2) - _END.size - 2**16))  # a comment may follow the record
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) < at + _END.size:
        raise zipfile.BadZipFile("it has no directory at its end")
    end, size = start + at, _END.unpack_from(tail, at)[5]
    record = end - _LOCATOR_64.size - _END_64.size
    if record >= 0:
        file.seek(record)
        fields, locator = _END_64.unpack(file.read(_END_64.size)), file.read(_LOCATOR_64.size)
        if locator.startswith(b"PK\x06\x07") and fields[0] == b"PK\x06\x06":
            return record, fields[8]
    return end, size


def _check_entries(entries: Sequence[zipfile.ZipInfo], label: str, limits: Limits) -> None:
    """Refuse unsafe names, names that are one and the same elsewhere, and sizes that add up to too much."""
    if len(entries) > limits.entries:  # the number at the end of the archive may be false
        raise _too_many(label, len(entries), limits)
    if sum(entry.file_size for entry in entries) > limits.bytes:
        raise _too_big(label, limits)
    files: dict[str, str] = {}  # as compared on systems that ignore case: as written
    folders: dict[str, str] = {}
    for entry in entries:
        _check_entry(entry, label)
        name = "/".join(part for part in entry.filename.split("/") if part not in ("", "."))
        key, folder = name.casefold(), name if entry.is_dir() else name.rpartition("/")[0]
        if not entry.is_dir():
            if key in files or key in folders:
                raise _clash(label, files.get(key) or folders[key], entry.filename)
            files[key] = entry.filename
        while folder:
            key = folder.casefold()
            if key in files:
                raise _clash(label, files[key], entry.filename)
            if folders.get(key, folder) != folder:
                raise _clash(label, folders[key], folder)
            if key in folders:
                break  # the folders above it are known too
            folders[key] = folder
            folder = folder.rpartition("/")[0]
        if len(files) + len(folders) > limits.entries:  # folders need no entries of their own
            raise _too_many(label, len(files) + len(folders), limits)


def _check_entry(entry: zipfile.ZipInfo, label: str) -> None:
    name = entry.orig_filename  # as stored in the archive; zipfile has already sanitised `filename`
    parts = PurePosixPath(name).parts
    kind = stat.S_IFMT(entry.external_attr >> 16)  # 0 if the packing system has no file types
    outside = name.startswith("/") or "\\" in name or re.match("[A-Za-z]:", name) or ".." in parts
    if outside or "\0" in name or not name:
        reason = "is not a plain path inside the archive"
    elif any(map(_RESERVED.fullmatch, parts)):
        reason = "has the name of a device on Windows"
    elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        reason = "is a link or a special file"
    elif entry.flag_bits & 0x1:
        reason = "is encrypted"
    else:
        return
    raise UserCodeError(f"{label}: the entry {name!r} {reason}. Pack the folder again with plain files only.")


def _clash(label: str, first: str, second: str) -> UserCodeError:
    case = "" if second in (first, f"{first}/") or second.startswith(f"{first}/") else f", beside {first!r}"
    return UserCodeError(f"{label} has two entries for {second!r}{case}. Pack the folder again.")


def _too_many(label: str, count: int, limits: Limits) -> UserCodeError:
    return UserCodeError(f"{label} has {count} entries, more than {limits.entries}. {limits.advice}")


def _too_big(label: str, limits: Limits) -> UserCodeError:
    return UserCodeError(f"{label} holds more than {limits.bytes // 2**20} MiB. {limits.advice}")
