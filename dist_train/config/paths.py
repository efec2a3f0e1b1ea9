"""Default folders: data sets, caches, run directories."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path

from dist_train.config.schema import _log


def default_data_root() -> Path:
    """$DIST_TRAIN_DATA_DIR, else dist_train in the user's cache folder."""
    explicit = os.environ.get("DIST_TRAIN_DATA_DIR")
    if explicit:
        return Path(explicit).expanduser()
    own = _own_cache()
    return own if own.is_dir() else user_cache()  # what lies there can be read at any rate


def user_cache() -> Path:
    """What may be lost and made again: data sets, compiled code."""
    return cache_stand_in() or _own_cache()


def cache_stand_in() -> Path | None:
    """A temporary folder, where the user's cache folder cannot be written and is nobody's choice. A line says so."""
    own = _own_cache()
    return None if os.environ.get("XDG_CACHE_HOME") or _can_write(own) else _temporary_cache(own)


def _own_cache() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dist_train"
    except RuntimeError:  # this user has no home
        return Path("/.cache/dist_train")


def _can_write(folder: Path) -> bool:
    """Whether it can be written, or made."""
    while not os.path.lexists(folder):
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK)


@cache
def _temporary_cache(own: Path) -> Path:
    folder = Path(tempfile.gettempdir()) / f"dist_train-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():  # somebody else was there first
        folder = Path(tempfile.mkdtemp(prefix="dist_train-"))
    if os.environ.get("RANK", "0") == "0":
        _log.warning("%s cannot be written: caches go to %s. XDG_CACHE_HOME names another place.", own, folder)
    return folder


def runs_root(runs_dir: Path | None = None) -> Path:
    """Where run directories lie: as the settings say, else as DIST_TRAIN_RUNS_DIR does, else in `runs`."""
    return (runs_dir or Path(os.environ.get("DIST_TRAIN_RUNS_DIR") or "runs")).expanduser()
