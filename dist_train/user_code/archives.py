"""Safe unpacking of a zip of user code into the cache folder, once for each content."""

from __future__ import annotations

import hashlib
import re
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from dist_train.atomic_files import atomic_write
from dist_train.config.paths import default_data_root
from dist_train.errors import UserCodeError

_MIB = 2**20
MAX_BYTES = 256 * _MIB  # for all files together: an archive holds code, not data
MAX_ENTRIES = 2000
_CHUNK = _MIB


def unpack_archive(archive: Path, label: str) -> Path:
    """Unpack the zip `archive` and return its folder, which is named by a digest of the zip's bytes.

    Ranks may call this at the same time: each unpacks its own copy, and the first rename wins.

    Raises:
        UserCodeError: `archive` is not a zip, is damaged, or has unsafe entries.
    """
    bundles = default_data_root() / "bundles"
    try:
        if archive.stat().st_size > MAX_BYTES:
            raise _too_big(label)
        with archive.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:32]
        folder = bundles / digest
        if folder.is_dir():
            return folder
        bundles.mkdir(parents=True, exist_ok=True)
        try:
            with atomic_write(folder) as temporary:
                temporary.mkdir()
                _extract(archive, temporary, label)
        except OSError:
            if not folder.is_dir():  # it exists if another rank was faster; the contents are the same
                raise
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserCodeError(f"{label} is not a readable zip: {error}. Pack it again, or give a folder.") from error
    except OSError as error:
        fix = "Set DIST_TRAIN_DATA_DIR to a writable folder, or give a folder instead of a zip."
        raise UserCodeError(f"{label} cannot be unpacked into {bundles}: {error}. {fix}") from error
    return folder


def _extract(archive: Path, folder: Path, label: str) -> None:
    remaining = MAX_BYTES
    with zipfile.ZipFile(archive) as bundle:
        entries = bundle.infolist()
        if len(entries) > MAX_ENTRIES:
            raise UserCodeError(f"{label} has {len(entries)} entries, more than {MAX_ENTRIES}. Pack only the code.")
        for entry in entries:
            _check_entry(entry, label)
            target = folder / entry.filename
            try:
                (target if entry.is_dir() else target.parent).mkdir(parents=True, exist_ok=True)
                if not entry.is_dir():
                    remaining -= _write(bundle, entry, target, remaining, label)
            except (FileExistsError, NotADirectoryError):
                raise UserCodeError(f"{label} has two entries for {entry.filename!r}. Pack the folder again.") from None


def _write(bundle: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path, max_bytes: int, label: str) -> int:
    # Bytes are counted while unpacking: the sizes in the header may be false.
    size = 0
    with bundle.open(entry) as source, target.open("xb") as file:
        while chunk := source.read(_CHUNK):
            size += len(chunk)
            if size > max_bytes:
                raise _too_big(label)
            file.write(chunk)
    return size


def _check_entry(entry: zipfile.ZipInfo, label: str) -> None:
    name = entry.orig_filename  # as stored in the archive; zipfile has already sanitised `filename`
    kind = stat.S_IFMT(entry.external_attr >> 16)  # 0 if the packing system has no file types
    outside = name.startswith("/") or "\\" in name or re.match("[A-Za-z]:", name) or ".." in PurePosixPath(name).parts
    if outside or "\0" in name or not name:
        reason = "is not a plain path inside the archive"
    elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        reason = "is a link or a special file"
    elif entry.flag_bits & 0x1:
        reason = "is encrypted"
    else:
        return
    raise UserCodeError(f"{label}: the entry {name!r} {reason}. Pack the folder again with plain files only.")


def _too_big(label: str) -> UserCodeError:
    return UserCodeError(f"{label} holds more than {MAX_BYTES // _MIB} MiB. Pack only code; put data into data.root.")
