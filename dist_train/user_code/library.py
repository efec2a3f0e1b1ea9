"""Models, data loaders and data sets by name and version, in `$DIST_TRAIN_DATA_DIR/library`.

models/NAME/VERSION/    files/ (or a link to a folder of the user's), version.json, optionally weights.pth
loaders/..., datasets/...

A version is `NUMBER-DIGEST`, complete from the moment that it is there, and never changed: what is added later is a new
version, and jobs that name an old one keep it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path

from dist_train.atomic_files import fsync, read_json, remove, remove_leftovers, temporary_path, write_json
from dist_train.config.paths import default_data_root
from dist_train.errors import LibraryError, did_you_mean
from dist_train.user_code.archives import Progress, unpack
from dist_train.user_code.contents import (
    CODE,
    Contents,
    ContentsDigest,
    Limits,
    contents_of_code,
    contents_of_data,
)
from dist_train.user_code.source_check import DATASET_FILE, MODEL_FILE, SourceCheck, check_source
from dist_train.user_code.weights_file import keep_weights

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,99}")
_VERSION = re.compile(r"(\d{1,9})-[0-9a-f]{12}")
_META = "version.json"
_FILES = "files"
_SHOWN = 4  # names at the top of a data set
_SPARE_BYTES = 2**30  # stay free on the disk


class Kind(StrEnum):
    MODELS = "models"
    LOADERS = "loaders"
    DATASETS = "datasets"


@dataclass(frozen=True)
class Version:
    """One version of one name. `path` is what a job names: `model.bundle`, `data.bundle` or `data.root`."""

    kind: Kind
    name: str
    version: str
    path: Path
    created: float  # time.time()
    bytes: int
    files: int
    digest: str  # sha256 of names and contents; of names and sizes for a folder of data that is only linked
    source: str | None  # the folder that `path` is a link to: edits there are seen by jobs
    weights: Path | None  # what a job names as `model.weights`
    check: SourceCheck

    @property
    def number(self) -> int:
        return _number(self.version)


@dataclass(frozen=True)
class Entry:
    kind: Kind
    name: str
    versions: tuple[Version, ...]  # the newest last, at least one

    @property
    def newest(self) -> Version:
        return self.versions[-1]


def library_root() -> Path:
    return default_data_root() / "library"


# --- looking up --------------------------------------------------------------------------------------------------


def entries(kind: Kind) -> list[Entry]:
    """Return all that is there of a kind, sorted by name."""
    names = (folder.name for folder in _visible(library_root() / kind))
    return [Entry(kind, name, found) for name in sorted(names) if (found := _versions(kind, name))]


def find(kind: Kind, name: str, version: str | None = None) -> Version:
    """Return a version, or the newest of `name`.

    Raises:
        LibraryError: there is none; with the nearest name.
    """
    found = _versions(kind, name) if NAME.fullmatch(name) else ()
    if not found:
        names = [entry.name for entry in entries(kind)]
        raise LibraryError(f"There is no {name} among the {kind}.{did_you_mean(name, names)}")
    chosen = [each for each in found if version in (None, each.version)]
    if not chosen:
        raise LibraryError(f"{kind}/{name} has no version {version}. It has: {', '.join(v.version for v in found)}.")
    return chosen[-1]


def last_change(kind: Kind) -> int:
    """Return a number that changes when a name or a version is added or deleted."""
    newest = 0
    for folder in (library_root() / kind, *_visible(library_root() / kind)):
        with suppress(OSError):
            newest = max(newest, folder.stat().st_mtime_ns)
    return newest


def check_name(name: str) -> None:
    """Raise LibraryError if `name` cannot be one."""
    if not NAME.fullmatch(name):
        raise LibraryError(
            f"{name!r} is no name: letters, digits and ._=+- without spaces, at most 100, a letter or digit first."
        )


def _versions(kind: Kind, name: str) -> tuple[Version, ...]:
    folders = [each for each in _visible(library_root() / kind / name) if _VERSION.fullmatch(each.name)]
    found = (_read(kind, name, folder) for folder in sorted(folders, key=lambda each: _number(each.name)))
    return tuple(each for each in found if each is not None)


def _visible(folder: Path) -> Iterator[Path]:
    try:
        yield from (each for each in folder.iterdir() if not each.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return


def _number(version: str) -> int:
    return int(version.partition("-")[0])


def _read(kind: Kind, name: str, folder: Path) -> Version | None:
    """Return the version in a folder; None if its description is damaged."""
    meta = read_json(folder / _META)
    try:
        check = SourceCheck(str(meta["check"]["summary"]), tuple(map(str, meta["check"]["problems"])))
        return Version(
            kind, name, folder.name, folder / _FILES, float(meta["created"]), int(meta["bytes"]), int(meta["files"]),
            str(meta["digest"]), meta["source"], folder / meta["weights"] if meta["weights"] else None, check,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError):
        return None


# --- adding ------------------------------------------------------------------------------------------------------


def add_zip(
    kind: Kind, name: str, archive: Path, *, weights: Path | None = None, progress: Progress = lambda *_: None
) -> Version:
    """Unpack a zip as the newest version of `name`. If a version has the same contents already, return that.

    `weights`: a .pth or .safetensors file, or a zip that holds one as `model.pth`; models only.

    Raises:
        LibraryError: the name is none, there is no such file, another process is changing `name`, or the disk is full.
        UserCodeError: the zip is none, or unsafe.
    """
    if not archive.is_file():
        raise LibraryError(f"{archive} is neither a zip nor a folder of this machine. Give its whole path, from / on.")

    def fill(files: Path) -> Contents:
        limits = CODE if kind != Kind.DATASETS else _data_limits(files.parent)
        return unpack(archive, files, f"The zip of {name}", limits, progress)

    return _add(kind, name, fill, weights)


def add_folder(kind: Kind, name: str, folder: Path, *, weights: Path | None = None) -> Version:
    """Add a folder of this machine as the newest version of `name`. It is linked, not copied.

    The digest of code covers its contents, that of data only names and sizes. Jobs see what the folder holds when they
    run, whatever the digest says.

    Raises:
        LibraryError: as `add_zip`, or `folder` is no folder.
    """
    if not folder.is_absolute() or not folder.is_dir():
        raise LibraryError(f"{folder} is no folder of this machine. Give its whole path, from / on.")

    def fill(files: Path) -> Contents:
        files.symlink_to(folder)
        return contents_of_data(folder) if kind == Kind.DATASETS else contents_of_code(folder)

    return _add(kind, name, fill, weights, source=str(folder))


def add_empty(name: str) -> Version:
    """Add an empty data set, for code that downloads its own.

    Raises:
        LibraryError: there is a data set of that name, or as `add_zip`.
    """

    def fill(files: Path) -> Contents:
        if _versions(Kind.DATASETS, name):
            raise LibraryError(f"There is a data set {name} already. Choose another name.")
        files.mkdir()
        return ContentsDigest().contents()

    return _add(Kind.DATASETS, name, fill, None)


def _add(
    kind: Kind, name: str, fill: Callable[[Path], Contents], weights: Path | None, source: str | None = None
) -> Version:
    with _changing(kind, name) as home:
        temporary = temporary_path(home / "version")
        try:
            temporary.mkdir(parents=True)
            found = fill(temporary / _FILES)
            kept = keep_weights(weights, temporary) if weights else None
            digest = hashlib.sha256(f"{found.digest}{kept.digest}".encode()).hexdigest() if kept else found.digest
            before = _versions(kind, name)
            for each in before:
                if (each.digest, each.source) == (digest, source):
                    return each
            meta = {
                "created": time.time(), "bytes": found.bytes, "files": found.files, "digest": digest, "source": source,
                "weights": kept.name if kept else None, "check": asdict(_check(kind, temporary / _FILES)),
            }  # fmt: skip
            write_json(temporary / _META, meta)
            os.sync()  # of each file alone would take hours for a data set of a million
            folder = home / f"{before[-1].number + 1 if before else 1}-{digest[:12]}"
            temporary.rename(folder)
            fsync(home)
        except OSError as error:
            raise LibraryError(f"{kind}/{name} cannot be kept in {home}: {error.strerror or error}.") from error
        finally:
            remove(temporary)
    return find(kind, name, folder.name)


def _check(kind: Kind, files: Path) -> SourceCheck:
    if kind == Kind.DATASETS:
        names = sorted(path.name for path in files.iterdir())
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        return SourceCheck(", ".join(names[:_SHOWN]) + more or "empty")
    return check_source(files, MODEL_FILE if kind == Kind.MODELS else DATASET_FILE)


def _data_limits(folder: Path) -> Limits:
    free = shutil.disk_usage(folder).free
    advice = f"{free / 1e9:.1f} GB are free in {library_root()}, of which {_SPARE_BYTES / 1e9:.1f} GB stay free."
    return Limits(max(0, free - _SPARE_BYTES), 2_000_000, advice)


@contextmanager
def _changing(kind: Kind, name: str) -> Iterator[Path]:
    """Hold the lock of a name, and yield its folder. What killed processes left there is removed."""
    check_name(name)
    home = library_root() / kind / name
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(home.parent / f".{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise LibraryError(f"{home} cannot be written: {error.strerror}. Set DIST_TRAIN_DATA_DIR.") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LibraryError(f"{kind}/{name} is being changed by another process. Try again in a moment.") from None
        try:
            remove_leftovers(home)
            yield home
        finally:
            with suppress(OSError):  # it holds versions, or was never made
                home.rmdir()
    finally:
        os.close(descriptor)


def remove_unfinished(kind: Kind | None = None, name: str = "") -> None:
    """Remove what killed processes left of a version that they were adding: under one name, or everywhere."""
    homes = [(kind, name)] if kind else [(each, home.name) for each in Kind for home in _visible(library_root() / each)]
    for where in homes:
        with suppress(LibraryError), _changing(*where):  # or another process is adding there
            pass


# --- deleting ----------------------------------------------------------------------------------------------------

_USE = re.compile(rf"library/({'|'.join(Kind)})/({NAME.pattern})/({_VERSION.pattern})(?![\w-])")


def uses(runs: Path) -> dict[tuple[Kind, str, str], list[str]]:
    """Return the names of the runs in a folder and its bin that name a version, by that version.

    A job that waits in Slurm's queue has no config.yaml yet: its script names what it will use.
    """
    found: dict[tuple[Kind, str, str], set[str]] = {}
    for pattern in ("config.yaml", "job.sbatch"):
        for file in (*runs.glob(f"*/{pattern}"), *runs.glob(f".bin/*/{pattern}")):
            run = file.parent
            called = run.name if run.parent == runs else f"{run.name.partition('-')[2]} in the bin"
            with suppress(OSError):
                stat = file.stat()
                for key in _named_in(file, (stat.st_mtime_ns, stat.st_ino)):
                    found.setdefault(key, set()).add(called)
    return {key: sorted(names) for key, names in found.items()}


@lru_cache(maxsize=20_000)  # the page asks for the same thousand files whenever its list changes
def _named_in(file: Path, _signature: tuple[int, int]) -> frozenset[tuple[Kind, str, str]]:
    found = _USE.findall(file.read_text(errors="replace"))
    return frozenset((Kind(kind), name, version) for kind, name, version, _ in found)


def delete(kind: Kind, name: str, version: str | None = None, *, runs: Path) -> None:
    """Remove a version, or all of them. Of a folder that was added by path only the link is removed.

    Raises:
        LibraryError: a run in the folder `runs` names it, there is none, or another process is changing `name`.
    """
    find(kind, name, version)
    with _changing(kind, name) as home:
        chosen = [each for each in _versions(kind, name) if version in (None, each.version)]
        used = uses(runs)
        for each in chosen:
            if jobs := used.get((kind, name, each.version)):
                more = f" and {len(jobs) - 3} more" if len(jobs) > 3 else ""
                raise LibraryError(
                    f"{kind}/{name} {each.version} is used by {', '.join(jobs[:3])}{more}. Delete those first."
                )
        for each in chosen:
            gone = temporary_path(home / each.version)  # a kill must not leave half of a version
            each.path.parent.rename(gone)
            remove(gone)
