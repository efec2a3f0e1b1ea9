"""The bin of a folder of runs: deleted runs, which can be restored until the bin is emptied."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dist_train.atomic_files import remove
from dist_train.errors import RunDirError
from dist_train.runs.directory import RunDir
from dist_train.runs.start_lock import hold_start_lock
from dist_train.runs.summary import summarise_existing

KEPT_S = 24 * 3600.0
_BIN = ".bin"
_REMOVING = ".removing_"  # name prefix of a run that is being removed
_DELETED = re.compile(r"(?P<time>\d{1,19})-(?P<name>.+)", re.DOTALL)  # nanoseconds, and the run


@dataclass(frozen=True)
class DeletedRun:
    path: Path
    name: str
    deleted: float  # time.time()


def delete(path: Path) -> None:
    """Move a run to the bin. It holds the run's locks meanwhile, so that no start begins in it.

    Raises:
        RunDirError: it may be running or starting, or the folder cannot be written.
    """
    summary = summarise_existing(path)
    if summary.may_be_running:
        raise RunDirError(f"{summary.name} is {summary.state}. Stop it first.")
    run_dir = RunDir(path)
    with hold_start_lock(run_dir):
        run_dir.lock()
        try:
            (path.parent / _BIN).mkdir(exist_ok=True)
            path.rename(path.parent / _BIN / f"{time.time_ns()}-{path.name}")
        except OSError as error:
            raise RunDirError(f"{path} cannot be moved to {path.parent / _BIN}: {error.strerror}.") from None
        finally:
            run_dir.unlock()


def find_deleted(folder: Path) -> Iterator[DeletedRun]:
    """Yield the runs in the bin of a folder, the last deleted first."""
    with suppress(OSError):
        for path in sorted((folder / _BIN).iterdir(), reverse=True):
            if found := _DELETED.fullmatch(path.name):
                yield DeletedRun(path, found["name"], int(found["time"]) / 1e9)


def restore(folder: Path, entry: str) -> str:
    """Move a run back from the bin, by the name of its folder there; returns the run's name.

    Raises:
        RunDirError: it is not in the bin, or another run has taken its name.
    """
    found = next((run for run in find_deleted(folder) if run.path.name == entry), None)
    if found is None:
        raise RunDirError("The run is not in the bin any more.")
    target = folder / found.name
    if os.path.lexists(target):
        raise RunDirError(f"There is another run named {found.name} now. Rename or delete that one first.")
    try:
        found.path.rename(target)
    except OSError as error:
        raise RunDirError(f"{found.name} cannot be restored: {error.strerror}.") from None
    return found.name


def empty(folder: Path, older_than_s: float | None = None) -> None:
    """Remove the runs of the bin for good: all, or those that were deleted at least `older_than_s` ago.

    Raises:
        RunDirError: one cannot be removed.
    """
    for run in find_deleted(folder):
        if older_than_s is None or time.time() - run.deleted >= older_than_s:
            try:  # a kill must not leave half of a run to be restored
                run.path.rename(run.path.with_name(f"{_REMOVING}{run.path.name}"))
            except OSError as error:
                raise RunDirError(f"{run.path} cannot be removed: {error.strerror}.") from None
    for path in (folder / _BIN).glob(f"{_REMOVING}*"):
        remove(path)
