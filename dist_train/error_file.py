"""error.json: which rank of a run was the first to fail, and of what."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dist_train.errors import DistTrainError
from dist_train.small_files import write_json


def _where(error: BaseException) -> str:
    """The innermost line of code that an unforeseen error comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def describe_error(found: Mapping[str, Any]) -> str:
    """What error.json says, and of which rank."""
    return f"{found['message']}  [rank {found['rank']} on {found['host']}]"


def note_error(path: Path, error: BaseException, rank: int, exit_code: int, trace: str) -> bool:
    """Write `error.json` unless a rank was first; True if this rank is the first to fail.

    Linked into place, so that of several failing ranks just one can be first: the others mostly report that a peer
    is gone.
    """
    temporary = path.with_name(f".{path.name}.{rank}.{os.getpid()}")
    try:
        own = isinstance(error, DistTrainError)
        message = str(error) if own else f"{type(error).__name__}: {error}{_where(error)}"
        write_json(
            temporary,
            {"rank": rank, "kind": type(error).__name__, "message": message, "exit_code": exit_code,
             "host": socket.gethostname(), "time": round(time.time(), 3), "traceback": trace},
        )  # fmt: skip
        os.link(temporary, path)
    except OSError:
        return not path.exists()
    else:
        return True
    finally:
        with suppress(OSError):  # on a read-only disk not even what is not there can be removed
            temporary.unlink(missing_ok=True)
