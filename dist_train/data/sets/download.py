"""Downloading a named data set through torchvision, so that a broken-off download leaves nothing half done."""

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
from dist_train.data.sets.idx import read_idx_set
from dist_train.data.sets.storage import disk_errors, locked, unwritable
from dist_train.errors import ConfigError, DataError

_log = logging.getLogger(__name__)
_STAGING = ".download-"
_SILENCE_S = 30.0  # a mirror that says nothing for so long will not answer; urllib alone would wait for ever
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def fetch(name: str, root: Path, split: str | None = None, *, progress: bool = False) -> Path:
    """Brings the files of a named set into `root`, unless they are there; returns their folder.

    Of emnist, whose splits come in one archive, all are kept; `split` only says which must be there.

    Raises:
        ConfigError: no such set.
        DataError: no mirror can be reached, or `root` cannot be written.
    """
    from dist_train.torchvision_compat import import_torchvision

    if name not in SETS:
        raise ConfigError(f"No data set {name}. There are: {', '.join(SETS)}.")
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
        for stale in root.glob(f"{_STAGING}*"):  # of a killed process: nobody else is writing now
            shutil.rmtree(stale, ignore_errors=True)
        build = getattr(import_torchvision().datasets, known.class_name)
        # Into a folder of its own first: torchvision writes in place, and others look for the files without the lock.
        staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=root))
        try:
            if not _unpack_idx(known, dict(getattr(build, "resources", ())), root, staging):
                _log.info("Downloading %s to %s.", name, folder)
                _link_archives(known, root, staging)
                with nullcontext() if progress else _quiet(), _impatient():
                    _download(name, build, staging, split)
            _move_files(known, staging, root)
        except Exception as error:
            raise _explain(error, name, known, root) from None
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    if not known.is_present(root, split):
        raise DataError(f"The mirror of {name} did not send all files that {folder} needs. Fetch them by hand.")
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
    """From archives that somebody already put where torchvision looks for them, if our own reader takes them all.

    torchvision would load them anew, and over them, where a mirror has packed the same files in another way.
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
            _log.warning("%s is a good archive, of another checksum (%s) than torchvision's; taken.", archive, checksum)
    _log.info("Unpacked %s from the archives in %s.", known.class_name, archives[0].parent)
    return True


def _link_archives(known: NamedSet, root: Path, staging: Path) -> None:
    """Archives that somebody already put where torchvision looks for them need no network."""
    for archive in known.archives:
        if (root / archive).is_file():
            (staging / archive).parent.mkdir(parents=True, exist_ok=True)
            (staging / archive).symlink_to((root / archive).resolve())


def _move_files(known: NamedSet, staging: Path, root: Path) -> None:
    packed = {staging / archive for archive in known.archives} - set(known.files(staging))  # svhn's are no archives
    for path in sorted(staging.rglob("*")):
        if path.is_file() and not path.is_symlink() and path not in packed:  # archives have done their work
            target = root / path.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            fsync(path)
            path.replace(target)
            fsync(target.parent)


@contextmanager
def _quiet() -> Iterator[None]:
    """torchvision draws one progress bar per file, and each rank would."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


@contextmanager
def _impatient() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SILENCE_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _explain(error: Exception, name: str, known: NamedSet, root: Path) -> Exception:
    if isinstance(error, OSError) and error.errno in _DISK:
        return unwritable(root, error)
    return DataError(
        f"{name} is not in {root / known.folder} and could not be downloaded "
        f"({type(error).__name__}: {' '.join(str(error).split())}). "
        f"Where there is network, on a login node for example, run: {fetch_command(name, root)}"
    )
