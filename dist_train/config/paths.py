"""Default folders of data sets, caches and run directories."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path

from dist_train.config.schema import _log


def default_data_root() -> Path:
    """Return $DIST_TRAIN_DATA_DIR, else the folder dist_train in the user's cache folder."""
    explicit = os.environ.get("DIST_TRAIN_DATA_DIR")
    if explicit:
        return Path(explicit).expanduser()
    own = _own_cache()
    return own if own.is_dir() else user_cache()  # an existing folder can be read even where it is not writable


def user_cache() -> Path:
    """Return the cache folder, for files that can be recreated: data sets, compiled code."""
    return temporary_cache() or _own_cache()


def temporary_cache() -> Path | None:
    """Return a temporary folder if the default cache folder is not writable, else None. The first use logs a warning.

    With XDG_CACHE_HOME set it is None: the user chose that folder.
    """
    own = _own_cache()
    return None if os.environ.get("XDG_CACHE_HOME") or _can_write(own) else _temporary_cache(own)


def _own_cache() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dist_train"
    except RuntimeError:  # this user has no home folder
        return Path("/.cache/dist_train")


def _can_write(folder: Path) -> bool:
    """Return whether `folder` is writable or can be created."""
    while not os.path.lexists(folder):
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK)


@cache
def _temporary_cache(own: Path) -> Path:
    try:
        folder = own_temporary_folder()
    except PermissionError:
        folder = Path(tempfile.mkdtemp(prefix="dist_train-"))
    if os.environ.get("RANK", "0") == "0":
        _log.warning("%s is not writable: caches go to %s. Set XDG_CACHE_HOME to choose another folder.", own, folder)
    return folder


def own_temporary_folder() -> Path:
    """Return the folder of this user among the temporary files of this machine; it is created if need be.

    Raises:
        PermissionError: another user created it first.
    """
    folder = Path(tempfile.gettempdir()) / f"dist_train-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} is not yours.")
    return folder


def runs_root(runs_dir: Path | None = None) -> Path:
    """Return the parent of run directories: the setting `runs_dir`, else $DIST_TRAIN_RUNS_DIR, else `runs`."""
    return (runs_dir or Path(os.environ.get("DIST_TRAIN_RUNS_DIR") or "runs")).expanduser()
