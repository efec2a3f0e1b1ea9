"""The run directory: its file names, its lock, and its small files.

It holds everything that a run records; W&B mirrors it. Only rank zero writes, except for the per-rank logs.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dist_train.atomic_files import write_atomically, write_json
from dist_train.config.loading import differences, load_config, to_yaml
from dist_train.config.schema import Config
from dist_train.errors import ConfigError, RunDirError
from dist_train.runs.disk_errors import DiskErrors
from dist_train.runs.extension import describe, may_change
from dist_train.runs.metrics_log import MetricsFile
from dist_train.runs.records import Error, Layers, Provenance, QueuedJob, Result, Submission, read_record
from dist_train.runs.status_file import StatusFile, is_of_earlier_start

_log = logging.getLogger(__name__)


class RunDir:
    """The paths and small files of one run. The constructor does no I/O."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.config = self.path / "config.yaml"
        self.run_json = self.path / "run.json"
        self._disk_errors = DiskErrors()
        self.status = StatusFile(self.path / "status.json", self._disk_errors)
        self.metrics = MetricsFile(self.path / "metrics.jsonl")
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"
        self.launcher_log = self.logs / "launcher.log"
        self.error = self.path / "error.json"
        self.result = self.path / "result.json"
        self.pictures = self.path / "pictures"
        self.profile = self.path / "profile"
        self.layers = self.path / "layers.json"
        # Created by users, from any shell.
        self.stop_request_file, self.save_request_file = self.path / "STOP", self.path / "SAVE"
        self.slurm_json = self.path / "slurm.json"  # written by `slurm submit`
        self.job_json = self.path / "job.json"  # of the queue

    @cached_property
    def _lock(self) -> FileLock:
        return FileLock(self.path / ".lock", timeout=0)  # readers of many runs never need it

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank_{rank:05d}.log"

    def create(self, *, new: bool = False) -> bool:
        """Create the directory and check that it is writable. With `new`, return False if it already exists.

        Raises:
            RunDirError: the directory cannot be written.
        """
        try:
            try:
                self.path.mkdir(parents=True, exist_ok=not new)
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
        status = self.status.fields or self.status.read()
        return status.get("wandb_id") or self.read_provenance().get("wandb_id")

    def step_folders(self) -> list[Path]:
        """Return the checkpoint folders, `step_<digits>`, newest first. Other folders there are ignored."""
        steps = [(step, path) for path in self.checkpoints.glob("step_*") if (step := step_of(path)) is not None]
        return [path for _, path in sorted(steps, reverse=True)]

    @property
    def holds_checkpoints(self) -> bool:
        """Whether there are checkpoints, counting those renamed because of damage or by an interrupted save."""
        return any(step_of(path) is not None for path in self.checkpoints.glob("*step_*"))

    def check_config(self, config: Config, *, extend: bool = False) -> None:
        """Refuse a directory that belongs to another config, but for what an extension may change. Writes nothing.

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
        difference = self.differences_to(config)
        if config.mixed_precision in (None, self.precision):  # unset: the run keeps its precision
            difference.pop("mixed_precision", None)
        if extend:
            difference = {key: both for key, both in difference.items() if not may_change(key)}
        if difference:
            lines = [f"  {key}: {old} in the run, {new} now" for key, (old, new) in sorted(difference.items())]
            raise ConfigError(
                f"{self.path} belongs to a run with other settings:\n" + "\n".join(lines) + "\n"
                "Choose another --run-name for the new run, or undo the change."
                + (" To train this run longer, give --extend." if "train_for" in difference else "")
            )

    def extension_to(self, config: Config) -> dict[str, tuple[str, str]]:
        """Return the settings that an extension changes, as `differences_to`."""
        return {key: both for key, both in self.differences_to(config).items() if may_change(key)}

    def differences_to(self, config: Config) -> dict[str, tuple[str, str]]:
        """Return the settings that may change results and differ, as YAML: {name: (of the run, of `config`)}."""
        return differences(load_config(str(self.config)).result_settings(), config.result_settings())

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

    @property
    def saved_step(self) -> int:
        """The step of the newest checkpoint, 0 if there is none."""
        return next((step for folder in self.step_folders() if (step := step_of(folder))), 0)

    def lock(self) -> None:
        """Lock the directory for this process. A second start is refused while the first holds the lock.

        Exception: the holder is an earlier start of this Slurm job, which may survive for a while on a node that the
        controller has lost contact with. It is superseded from this start's first status on.
        """
        try:
            self._lock.acquire()
        except OSError as error:
            status = self.status.read()
            if is_of_earlier_start(status, os.environ):
                return
            if not isinstance(error, Timeout):
                raise self._not_writable(error) from None
            raise RunDirError(
                f"{self.path} is in use by process {status.get('pid')} on {status.get('host')} "
                f"(attempt {status.get('attempt')}, state {status.get('state')}). "
                f"Wait for it, stop it, or choose another --run-name."
            ) from None

    def unlock(self) -> None:
        self._lock.release()

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        self.status.check_not_superseded()
        with self._disk_errors.tolerated(self.metrics.path):
            self.metrics.append(line)

    def cut_metrics(self, step: int, *, evaluation_pending: bool) -> int:
        """Cut metrics.jsonl back as `MetricsFile.cut` does.

        Raises:
            RunDirError: the file cannot be written, on a full disk for example.
        """
        with self._disk_errors.tolerated(self.metrics.path, required=True):
            return self.metrics.cut(step, evaluation_pending=evaluation_pending)

    def write_config(self, config: Config) -> None:
        """Write config.yaml, with a comment for each extension.

        Raises:
            RunDirError: the file cannot be written.
        """
        comments = [
            f"# extended {datetime.fromtimestamp(each['time']):%Y-%m-%d %H:%M} {describe(each)}\n"
            for each in self.read_provenance().get("extensions", ())
        ]
        with self._disk_errors.tolerated(self.config, required=True):
            write_atomically(self.config, "".join([*comments, to_yaml(config)]))

    def write_provenance(self, provenance: Mapping[str, Any]) -> None:
        """Write run.json: what determines the results, and what must survive a power cut that loses status.json."""
        kept = {name: self.status.fields[name] for name in ("attempt", "wandb_id")}
        with self._disk_errors.tolerated(self.run_json, required=True):
            write_json(self.run_json, {**provenance, **kept})

    def write_job(self, job: Mapping[str, Any]) -> None:
        """Write job.json.

        Raises:
            RunDirError: the file cannot be written.
        """
        with self._disk_errors.tolerated(self.job_json, required=True):
            write_json(self.job_json, job)

    def write_result(self, results: Mapping[str, Any]) -> None:
        """Write result.json.

        Raises:
            RunDirError: the file cannot be written.
        """
        with self._disk_errors.tolerated(self.result, required=True):
            write_json(self.result, results)

    def write_layers(self, layers: Sequence[Mapping[str, Any]]) -> None:
        """Write layers.json, the table of the net's layers."""
        with self._disk_errors.tolerated(self.layers):
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

    def take_request(self, path: Path) -> str | None:
        """Remove a request file and return its content. None if there is no such file."""
        try:
            content = path.read_bytes()
            path.unlink()
        except OSError:
            return None
        return content.decode(errors="replace")

    def read_provenance(self) -> dict[str, Any]:
        return read_record(self.run_json, Provenance)

    def read_error(self) -> dict[str, Any]:
        return read_record(self.error, Error)

    def read_result(self) -> dict[str, Any]:
        return read_record(self.result, Result)

    def read_layers(self) -> list[dict[str, Any]]:
        """Return the layers of the net: name, type, output shape, parameters. [] if they were not recorded."""
        layers: list[dict[str, Any]] = read_record(self.layers, Layers).get("layers", [])
        return layers

    def read_submission(self) -> dict[str, Any]:
        return read_record(self.slurm_json, Submission)

    def read_job(self) -> dict[str, Any]:
        return read_record(self.job_json, QueuedJob)


def step_of(folder: Path) -> int | None:
    """Return the step in a checkpoint folder's name, also of a damaged or replaced one. None for any other name."""
    match = re.fullmatch(r"(?:damaged_|\.replaced_)?step_([0-9]{8}|[1-9][0-9]{8,})", folder.name)
    return int(match[1]) if match else None
