"""The process that started this one: whether it lives, and what to do once it has died."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dist_train.distributed.process import (
    LAUNCHER_PID,
)

# Ranks whose launcher has died get this long to save and leave.
ORPHAN_GRACE_S = 3.0


def watch_launcher(on_death: Callable[[], None]) -> None:
    """Do not outlive the launcher: torchrun puts its workers in sessions of their own, and `kill -9` leaves them.

    When our parent, or the `dist-train launch` above it, has died, `on_death` is called (ask for an agreed stop) and
    after ORPHAN_GRACE_S this process ends, saved or not. A thread, since a parent-death signal would not reach past
    torchrun to our own launcher and does not exist outside Linux.
    """
    parent = os.getppid()
    launcher = int(os.environ.get(LAUNCHER_PID, parent))
    orphaned = parent == 1 and not _launches(parent)  # it died before we could look

    def watch() -> None:
        while not orphaned and os.getppid() == parent and is_alive(launcher):
            time.sleep(0.25)
        on_death()
        time.sleep(ORPHAN_GRACE_S)
        os._exit(1)

    threading.Thread(target=watch, name="watch_launcher", daemon=True).start()


def _launches(pid: int) -> bool:
    """Whether this is a launcher: in a container torchrun itself may be process 1."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return True  # not Linux: nothing to tell from
    return any(word in command for word in ("torchrun", "torch.distributed", "accelerate"))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with suppress(OSError):  # a zombie that nobody has waited for is dead too
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    return True
