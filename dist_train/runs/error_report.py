"""error.json: the rank of a run that failed first, and its error."""

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


def _location(error: BaseException) -> str:
    """Return the innermost file and line of an unexpected error."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def describe_error(report: Mapping[str, Any]) -> str:
    """Format error.json with its rank and host. Entries may be missing: damaged ones are dropped."""
    what = report.get("message") or report.get("kind") or "an unknown error: error.json is damaged"
    return f"{what}  [rank {report.get('rank', '?')} on {report.get('host', '?')}]"


def record_error(path: Path, error: BaseException, rank: int, exit_code: int, trace: str) -> bool:
    """Write `error.json` unless another rank did. Return True if this rank is the first to fail.

    The file is hard-linked into place, so that exactly one of several failing ranks is first: the others mostly report
    that a peer is gone.
    """
    temporary = temporary_path(path)
    try:
        own = isinstance(error, DistTrainError)
        message = str(error) if own else f"{type(error).__name__}: {error}{_location(error)}"
        write_json(
            temporary,
            {"rank": rank, "kind": type(error).__name__, "message": message, "exit_code": exit_code,
             "host": socket.gethostname(), "time": round(time.time(), 3), "traceback": trace},
        )  # fmt: skip
        _link_exclusively(temporary, path)
    except OSError:
        return not path.exists()
    else:
        return True
    finally:
        remove(temporary)


def _link_exclusively(temporary: Path, path: Path) -> None:
    """Link `temporary` to `path`, which must not exist.

    Raises:
        FileExistsError: another rank was first.
    """
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        with path.open("xb") as file:  # this file system has no hard links
            file.write(temporary.read_bytes())
