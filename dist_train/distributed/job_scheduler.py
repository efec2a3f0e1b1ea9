"""The interface of a rank to the scheduler of its job. The class here is the default without a scheduler."""

from __future__ import annotations

from pathlib import Path

from dist_train.distributed.signals import StopState


class JobScheduler:
    """The default when there is no scheduler. Only rank zero calls it."""

    stop_file: Path | None = None  # the job's batch shell creates it to request that the ranks stop

    def classify_sigterm(self) -> StopState:
        """Return what a TERM means. May wait for an answer of the scheduler."""
        return "INTERRUPT"

    def on_first_save(self, save_s: float) -> None:
        """Report how many seconds a save takes. Returns at once."""
