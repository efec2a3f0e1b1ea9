"""Detection that the launcher of this process has died."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dist_train.distributed.process_info import LAUNCHER_PID

# Ranks whose launcher has died have this long to save and exit.
ORPHAN_GRACE_S = 3.0


def watch_launcher(on_death: Callable[[], None]) -> None:
    """End this process soon after its launcher dies: torchrun's workers, in own sessions, survive its `kill -9`.

    When the parent, or the `dist-train launch` above it, has died, a thread calls `on_death` (to request an agreed
    stop) and ends this process after ORPHAN_GRACE_S, saved or not. A parent-death signal would not do: it covers only
    the parent (torchrun), not our own launcher, and exists only on Linux.
    """
    parent = os.getppid()
    launcher = int(os.environ.get(LAUNCHER_PID, parent))
    orphaned = parent == 1 and not _is_launcher(parent)  # the launcher died before this call

    def watch() -> None:
        while not orphaned and os.getppid() == parent and is_alive(launcher):
            time.sleep(0.25)
        on_death()
        time.sleep(ORPHAN_GRACE_S)
        os._exit(1)

    threading.Thread(target=watch, name="watch_launcher", daemon=True).start()


def _is_launcher(pid: int) -> bool:
    """Return whether `pid` is a launcher: in a container torchrun itself may be process 1."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return True  # not Linux: unknown
    return any(word in command for word in ("torchrun", "torch.distributed", "accelerate"))


def is_alive(pid: int) -> bool:
    """Return whether the process exists and is not a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with suppress(OSError):  # a zombie, not yet waited for, counts as dead
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    return True
