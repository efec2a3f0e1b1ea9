"""error.json: which rank of a run was the first to fail, and of what."""

from __future__ import annotations

import errno
import os
import socket
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_train.atomic_files import remove, temporary_path, write_json
from dist_train.errors import DistTrainError


def _where(error: BaseException) -> str:
    """The innermost line of code that an unforeseen error comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def describe_error(found: Mapping[str, Any]) -> str:
    """What error.json says, and of which rank; a part of it may have been damaged."""
    what = found.get("message") or found.get("kind") or "an error that error.json does not tell any more"
    return f"{what}  [rank {found.get('rank', '?')} on {found.get('host', '?')}]"


def note_error(path: Path, error: BaseException, rank: int, exit_code: int, trace: str) -> bool:
    """Write `error.json` unless a rank was first; True if this rank is the first to fail.

    Linked into place, so that of several failing ranks just one can be first: the others mostly report that a peer
    is gone.
    """
    aside = temporary_path(path)
    try:
        own = isinstance(error, DistTrainError)
        message = str(error) if own else f"{type(error).__name__}: {error}{_where(error)}"
        write_json(
            aside,
            {"rank": rank, "kind": type(error).__name__, "message": message, "exit_code": exit_code,
             "host": socket.gethostname(), "time": round(time.time(), 3), "traceback": trace},
        )  # fmt: skip
        _take_name(aside, path)
    except OSError:
        return not path.exists()
    else:
        return True
    finally:
        remove(aside)


def _take_name(aside: Path, path: Path) -> None:
    """Raises FileExistsError if another rank was first."""
    try:
        os.link(aside, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        with path.open("xb") as file:  # there are no links on this file system
            file.write(aside.read_bytes())
