"""Downloads of named data sets through torchvision; an interrupted download leaves no partial files."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import logging
import shutil
import socket
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from dist_train.atomic_files import fsync
from dist_train.data.sets.bundled_mnist import unpack_mnist
from dist_train.data.sets.catalog import SETS, NamedSet, check_packages, fetch_command
from dist_train.data.sets.data_folder import disk_errors, locked, unwritable
from dist_train.data.sets.idx import read_idx_set
from dist_train.errors import ConfigError, DataError

_log = logging.getLogger(__name__)
_STAGING = ".download-"
_SOCKET_TIMEOUT_S = 30.0  # for a mirror that does not respond; urllib has no timeout by default
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def fetch(name: str, root: Path, split: str | None = None, *, progress: bool = False) -> Path:
    """Download the files of a named set to `root` unless they exist, and return their folder.

    All splits of emnist come in one archive and are kept; `split` only says which one must exist.

    Raises:
        ConfigError: the set is unknown.
        DataError: no mirror can be reached, or `root` cannot be written.
    """
    from dist_train.torchvision_compat import import_torchvision

    if name not in SETS:
        raise ConfigError(f"{name} is not a known data set. Known: {', '.join(SETS)}.")
    known = SETS[name]
    check_packages(name)
    if name == "mnist":
        return unpack_mnist(root)
    folder = root / known.folder
    if known.is_present(root, split):
        return folder
    with locked(root), disk_errors(root):
        if known.is_present(root, split):  # another process was faster
            return folder
        for stale in root.glob(f"{_STAGING}*"):  # of a killed process: only the lock's holder writes
            shutil.rmtree(stale, ignore_errors=True)
        build = getattr(import_torchvision().datasets, known.class_name)
        # Use a staging folder: torchvision writes in place, and other processes look for the files without the lock.
        staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=root))
        try:
            if not _unpack_idx(known, dict(getattr(build, "resources", ())), root, staging):
                _log.info("Downloading %s to %s.", name, folder)
                _link_archives(known, root, staging)
                with nullcontext() if progress else _suppressed_output(), _socket_timeout():
                    _download(name, build, staging, split)
            _move_files(known, staging, root)
        except Exception as error:
            raise _to_data_error(error, name, known, root) from None
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    if not known.is_present(root, split):
        raise DataError(f"The mirror of {name} did not send all files that {folder} needs. Download them by hand.")
    return folder


def _download(name: str, build: Callable[..., Any], staging: Path, split: str | None) -> None:
    halves: list[dict[str, Any]] = [{}]
    if name == "emnist":
        halves = [{"split": split or "balanced"}]
    elif name == "svhn":
        halves = [{"split": "train"}, {"split": "test"}]
    for arguments in halves:
        build(staging, download=True, **arguments)


def _unpack_idx(known: NamedSet, checksums: Mapping[str, str], root: Path, staging: Path) -> bool:
    """Unpack archives already in torchvision's location; return False unless our own reader accepts them all.

    torchvision would download and overwrite archives of the same files that a mirror has compressed differently.
    """
    archives = [root / archive for archive in known.archives]
    if known.classes is None or not all(archive.is_file() for archive in archives):
        return False
    train_images, train_labels, test_images, test_labels = files = known.files(staging)
    try:
        for archive, file in zip(archives, files, strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            with gzip.open(archive) as packed, file.open("wb") as out:
                shutil.copyfileobj(packed, out)
        read_idx_set(train_images, train_labels, known.classes)
        read_idx_set(test_images, test_labels, known.classes)
    except (gzip.BadGzipFile, EOFError, zlib.error, DataError) as error:
        _log.warning("%s cannot be used: %s", archives[0].parent, error)
        return False
    for archive in archives:
        with archive.open("rb") as packed:
            checksum = hashlib.file_digest(packed, "md5").hexdigest()
        if checksum != checksums[archive.name]:
            _log.warning("Using %s: a valid archive, but its checksum (%s) is not torchvision's.", archive, checksum)
    _log.info("Unpacked %s from the archives in %s.", known.class_name, archives[0].parent)
    return True


def _link_archives(known: NamedSet, root: Path, staging: Path) -> None:
    """Link archives that are already in torchvision's location, so that they need no network."""
    for archive in known.archives:
        if (root / archive).is_file():
            (staging / archive).parent.mkdir(parents=True, exist_ok=True)
            (staging / archive).symlink_to((root / archive).resolve())


def _move_files(known: NamedSet, staging: Path, root: Path) -> None:
    packed = {staging / archive for archive in known.archives} - set(
        known.files(staging)
    )  # svhn's archives are its files
    for path in sorted(staging.rglob("*")):
        if path.is_file() and not path.is_symlink() and path not in packed:  # not the unpacked archives
            target = root / path.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            fsync(path)
            path.replace(target)
            fsync(target.parent)


@contextmanager
def _suppressed_output() -> Iterator[None]:
    """Suppress output: torchvision shows a progress bar per file, on each rank."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


@contextmanager
def _socket_timeout() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SOCKET_TIMEOUT_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _to_data_error(error: Exception, name: str, known: NamedSet, root: Path) -> Exception:
    if isinstance(error, OSError) and error.errno in _DISK:
        return unwritable(root, error)
    return DataError(
        f"{name} is not in {root / known.folder} and could not be downloaded "
        f"({type(error).__name__}: {' '.join(str(error).split())}). "
        f"On a machine with network access, for example a login node, run: {fetch_command(name, root)}"
    )
