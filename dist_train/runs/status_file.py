"""status.json: what the newest attempt of a run says of itself, and since when."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_train.atomic_files import write_json
from dist_train.distributed.process_info import slurm_job
from dist_train.errors import RunDirError
from dist_train.runs import heartbeat
from dist_train.runs.disk_errors import DiskErrors
from dist_train.runs.records import Status, read_record
from dist_train.runs.time_accounting import TimeAccounting, Use

CLEAN_ENDS = ("FINISHED", "INTERRUPT", "PREEMPTED")
ENDS = (*CLEAN_ENDS, "ERROR")
_USES: dict[str | None, Use] = {"TRAINING": "train", "EVALUATING": "evaluate", "EVALUATED": "train", "SAVING": "save"}


class StatusFile:
    """The status of a run. Anybody reads it; rank zero of an attempt updates it. The constructor does no I/O."""

    def __init__(self, path: Path, disk_errors: DiskErrors) -> None:
        self.path = path
        self.attempt = 0  # of this process; this and the next two are set by `begin`
        self.fields: dict[str, Any] = {}
        self.time_accounting = TimeAccounting({}, 0.0, 0, 0.0)
        self._disk_errors = disk_errors
        self._written = -math.inf  # time.monotonic()

    def read(self) -> dict[str, Any]:
        return read_record(self.path, Status)

    def begin(self, fields: dict[str, Any], time_accounting: TimeAccounting) -> None:
        """Set what this attempt starts with; the next update writes it."""
        self.attempt, self.fields, self.time_accounting = fields["attempt"], fields, time_accounting

    def record(self, **fields: Any) -> None:
        """Set new values of `fields`, which the next update writes. Time counts as use of a new state from now on."""
        self.fields |= fields
        if "step" in fields:
            self.time_accounting.record_step(fields["step"], fields.get("data_wait_s", 0.0))
        if use := _USES.get(fields.get("state")):
            self.time_accounting.switch_to(use)

    def update(self, **fields: Any) -> None:
        """Write new values of `fields`, and the heartbeat. Without a new state it writes at most once a second.

        Raises:
            RunDirError: this attempt was superseded, or STARTING or a clean end cannot be written: others act on it.
        """
        self.record(**fields)
        if "state" not in fields and time.monotonic() - self._written < heartbeat.AT_MOST_EVERY_S:
            return
        self._written = time.monotonic()
        self.check_not_superseded()
        state = self.fields.get("state")
        now = {"seconds": self.time_accounting.totals(), "heartbeat": round(time.time(), 3)}
        with self._disk_errors.tolerated(self.path, required=state in (*CLEAN_ENDS, "STARTING")):
            write_json(self.path, self.fields | now, durable=False)

    def record_resume(self, step: int, world_size: int) -> None:
        """Record the step that this attempt starts at, and how many attempts in a row started there without a save."""
        fruitless = self.fields.get("fruitless_starts", 0) + 1 if self.fields.get("resumed_at") == step else 0
        self.update(state="SETUP", world_size=world_size, resumed_at=step, fruitless_starts=fruitless)

    def check_not_superseded(self) -> None:
        """Check that this attempt may write. A later attempt owns the directory from its first status on.

        Raises:
            RunDirError: this attempt was superseded.
        """
        if self.is_superseded():
            newest = self.read().get("attempt")
            raise RunDirError(f"{self.path.parent}: attempt {self.attempt} was superseded by attempt {newest}.")

    def is_superseded(self) -> bool:
        newest: int = self.read().get("attempt", 0)
        return 0 < self.attempt < newest


def is_of_earlier_start(status: Mapping[str, Any], env: Mapping[str, str]) -> bool:
    """Whether `status` was written by an earlier start of this Slurm job."""
    job, restarts = slurm_job(env), int(env.get("SLURM_RESTART_COUNT") or 0)
    former = int(status.get("slurm_restart_count") or 0)
    return job is not None and status.get("slurm_job_id") == job and former < restarts
