"""The run directory: its file names, its lock, its attempts and status.json.

It holds everything that a run records; W&B mirrors it. Only rank zero writes, except for the per-rank logs.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dist_train.atomic_files import remove_leftovers, write_atomically, write_json
from dist_train.config.loading import load_config, to_yaml
from dist_train.config.schema import Config
from dist_train.distributed.process import REQUEUED, slurm_job
from dist_train.errors import ConfigError, RunDirError
from dist_train.runs.metrics_log import MetricsFile
from dist_train.runs.records import Error, Provenance, Result, Status, Submission, read_record
from dist_train.runs.time_accounting import TimeAccounting, Use

CLEAN_ENDS = ("FINISHED", "INTERRUPT", "PREEMPTED")
ENDS = (*CLEAN_ENDS, "ERROR")
_USES: dict[str | None, Use] = {"TRAINING": "train", "EVALUATING": "evaluate", "EVALUATED": "train", "SAVING": "save"}

_STATUS_S = 1.0  # between writes; one takes a third of a millisecond, as much as half a small step

_log = logging.getLogger(__name__)


class RunDir:
    """The paths and small files of one run. The constructor does no I/O."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.config = self.path / "config.yaml"
        self.run_json = self.path / "run.json"
        self.status = self.path / "status.json"
        self.metrics = MetricsFile(self.path / "metrics.jsonl")
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"
        self.launcher_log = self.logs / "launcher.log"
        self.error = self.path / "error.json"
        self.result = self.path / "result.json"
        self.pictures = self.path / "pictures"
        self.layers = self.path / "layers.json"
        # Created by users, from any shell.
        self.stop_request_file, self.save_request_file = self.path / "STOP", self.path / "SAVE"
        self.slurm_json = self.path / "slurm.json"  # written by `slurm submit`
        self.attempt = 0  # this and the next are set by begin_attempt
        self.time_accounting = TimeAccounting({}, 0.0, 0, 0.0)
        self._fields: dict[str, Any] = {}
        self._status_written = -math.inf  # time.monotonic()
        self._unwritable: set[Path] = set()
        self._lock = FileLock(self.path / ".lock", timeout=0)

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank_{rank:05d}.log"

    def create(self, *, new: bool = False) -> bool:
        """Create the directory and check that it is writable. With `new`, return False if it already exists.

        Raises:
            RunDirError: the directory cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.path.mkdir(exist_ok=not new)
            except FileExistsError:
                if new:
                    return False
                raise
            self.logs.mkdir(exist_ok=True)
            probe = self.path / f".probe_{socket.gethostname()}_{os.getpid()}"
            probe.write_text("x")
            probe.unlink(missing_ok=True)  # another start may have removed it
        except OSError as error:
            raise self._not_writable(error) from None
        return True

    def _not_writable(self, error: OSError) -> RunDirError:
        return RunDirError(
            f"Run directory {self.path} cannot be written: {error.strerror}. "
            f"Choose another location with runs_dir or DIST_TRAIN_RUNS_DIR."
        )

    @property
    def run_id(self) -> str | None:
        """The id that all attempts and all copies of the directory share. None if no file records it."""
        status = self._fields or self.read_status()
        return status.get("wandb_id") or self.read_provenance().get("wandb_id")

    def step_folders(self) -> list[Path]:
        """Return the checkpoint folders, `step_<digits>`, newest first. Other folders there are ignored."""
        steps = [(step, path) for path in self.checkpoints.glob("step_*") if (step := step_of(path)) is not None]
        return [path for _, path in sorted(steps, reverse=True)]

    @property
    def holds_checkpoints(self) -> bool:
        """Whether there are checkpoints, counting those renamed because of damage or by an interrupted save."""
        return any(step_of(path) is not None for path in self.checkpoints.glob("*step_*"))

    def check_config(self, config: Config) -> None:
        """Refuse a directory that belongs to another config. Writes nothing.

        Raises:
            ConfigError: lists the settings that differ, with both values.
            RunDirError: the path is not a legal directory name.
        """
        try:
            exists = self.config.exists()
        except OSError as error:  # a name that is too long, for example
            raise self._not_writable(error) from None
        if not exists or not self.holds_checkpoints:
            return  # nothing of another run could be lost: a start that was refused does not reserve its name
        difference = load_config(str(self.config)).result_diff(config)
        if config.mixed_precision in (None, self.precision):  # unset: the run keeps its precision
            difference.pop("mixed_precision", None)
        if difference:
            lines = [f"  {key}: {old} in the run, {new} now" for key, (old, new) in sorted(difference.items())]
            raise ConfigError(
                f"{self.path} belongs to a run with other settings:\n" + "\n".join(lines) + "\n"
                "Choose another --run-name for the new run, or undo the change."
            )

    @property
    def precision(self) -> str | None:
        """The precision that the run started with, from settings or launcher. None if there are no checkpoints."""
        try:
            if not self.holds_checkpoints:
                return None
        except OSError as error:  # a name that is too long, for example
            raise self._not_writable(error) from None
        recorded = self.read_provenance().get("mixed_precision")
        return recorded or (load_config(str(self.config)).mixed_precision if self.config.exists() else None)

    def lock(self) -> None:
        """Lock the directory for this process. A second start is refused while the first holds the lock.

        Exception: the holder is an earlier start of this Slurm job, which may survive for a while on a node that the
        controller has lost contact with. It is superseded from this start's first status on.
        """
        try:
            self._lock.acquire()
        except (Timeout, OSError):
            status = self.read_status()
            if _is_earlier_start(status, os.environ):
                return
            raise RunDirError(
                f"{self.path} is in use by process {status.get('pid')} on {status.get('host')} "
                f"(attempt {status.get('attempt')}, state {status.get('state')}). "
                f"Wait for it, stop it, or choose another --run-name."
            ) from None

    def unlock(self) -> None:
        self._lock.release()

    def begin_attempt(
        self, config: Config, wandb_id: str, started: float | None = None, asked_at: float | None = None
    ) -> None:
        """Number this attempt and write config.yaml. Needs the lock. `wandb_id` is used by the first attempt only.

        `started`: time.perf_counter() when the process started; `asked_at`: when the command was given.
        """
        started = time.perf_counter() if started is None else started
        # status.json, or a part of it, may be lost to a power cut; run.json is older, but synced.
        before = self.read_provenance() | self.read_status()
        self.attempt = before.get("attempt", 0) + 1
        if self._belongs_to_other_config(config):
            before = {}
        last_seen = before.get("heartbeat") or self.read_submission().get("submitted") or time.time()
        reached = max(before.get("reached", 0), before.get("step", 0))  # of all attempts: one may die in its set-up
        self.time_accounting = TimeAccounting(
            before.get("seconds", {}),
            down_s=time.time() - (time.perf_counter() - started) - last_seen,
            reached=reached,
            started=started,
        )
        self._fields = {
            "attempt": self.attempt,
            "reached": reached,
            "wandb_id": before.get("wandb_id") or wandb_id,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "slurm_job_id": slurm_job(os.environ),
            "slurm_restart_count": os.environ.get("SLURM_RESTART_COUNT"),
            **{name: before[name] for name in ("resumed_at", "fruitless_starts") if name in before},
        }
        for stale in (self.error, self.result):
            stale.unlink(missing_ok=True)
        with self._tolerate_write_error(self.config, required=True):
            write_atomically(self.config, to_yaml(config))
        self._remove_stale_requests(started if asked_at is None else asked_at)
        self.set_status(state="STARTING")
        self._remove_leftovers()

    def _remove_stale_requests(self, asked_at: float) -> None:
        """Remove a STOP and a SAVE file that were meant for an earlier start. config.yaml has just been written.

        A file is meant for this start if it is newer than the command; for a job, newer than its submission; for a
        requeued or restarted run, newer than its last status. Uses file modification times.
        """
        if _is_earlier_start(self.read_status(), os.environ) or REQUEUED in os.environ:
            since = self.status.stat().st_mtime if self.status.exists() else 0.0
        elif slurm_job(os.environ) is not None and self.read_submission().get("job") == slurm_job(os.environ):
            since = self.slurm_json.stat().st_mtime
        else:
            since = self.config.stat().st_mtime - (time.perf_counter() - asked_at)
        for request_file in (self.stop_request_file, self.save_request_file):
            with suppress(OSError):
                if request_file.stat().st_mtime < since:
                    request_file.unlink()

    def _belongs_to_other_config(self, config: Config) -> bool:
        """Whether the directory is of a run with other settings that left no checkpoint (see `check_config`)."""
        if self.holds_checkpoints:
            return False
        try:
            return bool(self.config.exists() and load_config(str(self.config)).result_diff(config))
        except ConfigError:  # damaged
            return True

    def _remove_leftovers(self) -> None:
        """Remove incomplete files of starts that were killed."""
        remove_leftovers(self.path)
        for stale in (*self.path.glob(".probe_*"), *self.path.glob(".token_*")):
            stale.unlink(missing_ok=True)

    def record_resume(self, step: int, world_size: int) -> None:
        """Record the step that this attempt starts at, and how many attempts in a row started there without a save."""
        fruitless = self._fields.get("fruitless_starts", 0) + 1 if self._fields.get("resumed_at") == step else 0
        self.set_status(state="SETUP", world_size=world_size, resumed_at=step, fruitless_starts=fruitless)

    def check_not_superseded(self) -> None:
        """Check that this attempt may write. A later attempt owns the directory from its first status on.

        Raises:
            RunDirError: this attempt was superseded.
        """
        if self.is_superseded():
            current = self.read_status().get("attempt")
            raise RunDirError(f"{self.path}: attempt {self.attempt} was superseded by attempt {current}.")

    def is_superseded(self) -> bool:
        newest: int = self.read_status().get("attempt", 0)
        return 0 < self.attempt < newest

    def set_status(self, **fields: Any) -> None:
        """Update status.json and its heartbeat. Without a new state it is written at most once a second.

        Raises:
            RunDirError: this attempt was superseded, or STARTING or a clean end cannot be written: others act on it.
        """
        self._fields |= fields
        if "step" in fields:
            self.time_accounting.record_step(fields["step"], fields.get("data_wait_s", 0.0))
        if "state" not in fields and time.monotonic() - self._status_written < _STATUS_S:
            return
        self._status_written = time.monotonic()
        self.check_not_superseded()
        state = self._fields.get("state")
        if use := _USES.get(fields.get("state")):
            self.time_accounting.switch_to(use)
        now = {"seconds": self.time_accounting.totals(), "heartbeat": round(time.time(), 3)}
        with self._tolerate_write_error(self.status, required=state in (*CLEAN_ENDS, "STARTING")):
            write_json(self.status, self._fields | now, durable=False)

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        self.check_not_superseded()
        with self._tolerate_write_error(self.metrics.path):
            self.metrics.append(line)

    def cut_metrics(self, step: int, *, evaluation_pending: bool) -> int:
        """Cut metrics.jsonl back as `MetricsFile.cut` does.

        Raises:
            RunDirError: the file cannot be written, on a full disk for example.
        """
        with self._tolerate_write_error(self.metrics.path, required=True):
            return self.metrics.cut(step, evaluation_pending=evaluation_pending)

    def write_provenance(self, provenance: Mapping[str, Any]) -> None:
        """Write run.json: what determines the results, and what must survive a power cut that loses status.json."""
        kept = {name: self._fields[name] for name in ("attempt", "wandb_id")}
        with self._tolerate_write_error(self.run_json, required=True):
            write_json(self.run_json, {**provenance, **kept})

    def write_result(self, results: Mapping[str, Any]) -> None:
        """Write result.json.

        Raises:
            RunDirError: the file cannot be written.
        """
        with self._tolerate_write_error(self.result, required=True):
            write_json(self.result, results)

    def write_layers(self, layers: Sequence[Mapping[str, Any]]) -> None:
        """Write layers.json, the table of the net's layers."""
        with self._tolerate_write_error(self.layers):
            write_json(self.layers, {"layers": layers}, durable=False)

    def write_pictures(self, pictures: Mapping[str, bytes]) -> None:
        """Write PNGs by name. One that cannot be written is a warning."""
        for name, picture in pictures.items():
            path = self.pictures / f"{name}.png"
            try:
                self.pictures.mkdir(exist_ok=True)
                write_atomically(path, picture, durable=False)
            except OSError as error:
                _log.warning("%s cannot be written: %s", path, error.strerror)

    @contextmanager
    def _tolerate_write_error(self, path: Path, *, required: bool = False) -> Iterator[None]:
        """Report a full or read-only disk once instead of ending the training. The next write tries again."""
        try:
            yield
        except OSError as error:
            if required:
                raise RunDirError(f"{path} cannot be written: {error.strerror}. Make room, then start again.") from None
            if path not in self._unwritable:
                _log.warning(
                    "%s cannot be written: %s. Training continues; the next write tries again.", path, error.strerror
                )
            self._unwritable.add(path)
        else:
            self._unwritable.discard(path)

    def take_request(self, path: Path) -> str | None:
        """Remove a request file and return its content. None if there is no such file."""
        try:
            content = path.read_bytes()
            path.unlink()
        except OSError:
            return None
        return content.decode(errors="replace")

    def read_status(self) -> dict[str, Any]:
        return read_record(self.status, Status)

    def read_provenance(self) -> dict[str, Any]:
        return read_record(self.run_json, Provenance)

    def read_error(self) -> dict[str, Any]:
        return read_record(self.error, Error)

    def read_result(self) -> dict[str, Any]:
        return read_record(self.result, Result)

    def read_submission(self) -> dict[str, Any]:
        return read_record(self.slurm_json, Submission)

    def check_room(self, needed_bytes: int) -> None:
        """Check that a first checkpoint fits on the disk.

        Raises:
            RunDirError: names the needed and the free space.
        """
        free = shutil.disk_usage(self.path).free
        if free < needed_bytes:
            raise RunDirError(
                f"A checkpoint needs {needed_bytes / 2**20:.1f} MiB and {self.path} has {free / 2**20:.1f} MiB free. "
                f"Make room, or choose another location with runs_dir or DIST_TRAIN_RUNS_DIR."
            )


def step_of(folder: Path) -> int | None:
    """Return the step in a checkpoint folder's name, also of a damaged or replaced one. None for any other name."""
    match = re.fullmatch(r"(?:damaged_|\.replaced_)?step_([0-9]{8}|[1-9][0-9]{8,})", folder.name)
    return int(match[1]) if match else None


def _is_earlier_start(status: Mapping[str, Any], env: Mapping[str, str]) -> bool:
    """Whether `status` was written by an earlier start of this Slurm job."""
    job, restarts = slurm_job(env), int(env.get("SLURM_RESTART_COUNT") or 0)
    former = int(status.get("slurm_restart_count") or 0)
    return job is not None and status.get("slurm_job_id") == job and former < restarts
