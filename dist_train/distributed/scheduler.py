"""What a rank asks of the scheduler of its job. Without one there is nobody to ask."""

from __future__ import annotations

from pathlib import Path

from dist_train.distributed.signals import StopState


class Scheduler:
    """None. Rank zero alone asks."""

    stop_file: Path | None = None  # made by the job's batch shell when the ranks have to make room

    def classify_sigterm(self) -> StopState:
        """What a TERM means. May wait for an answer of the scheduler."""
        return "INTERRUPT"

    def on_first_save(self, save_s: float) -> None:
        """A save takes so many seconds. Returns at once."""
