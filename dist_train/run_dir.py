"""The run directory: the names in it, its lock and attempts, status.json, metrics.jsonl.

Everything a run knows lies here; W&B mirrors it. Only rank zero writes, the per-rank logs aside.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from dist_train.config import Config
from dist_train.config_file import load_config, to_yaml
from dist_train.environment import slurm_job
from dist_train.errors import ConfigError, DistTrainError, RunDirError

State = Literal[
    "CREATED", "STARTING", "SETUP", "TRAINING", "EVALUATING", "EVALUATED", "SAVING",
    "FINISHED", "INTERRUPT", "PREEMPTED", "ERROR",
]  # fmt: skip

CLEAN_ENDS = ("FINISHED", "INTERRUPT", "PREEMPTED")


class RunDir:
    """Paths and small files of one run. Making the object touches nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.config = self.path / "config.yaml"
        self.run_json = self.path / "run.json"
        self.status = self.path / "status.json"
        self.metrics = self.path / "metrics.jsonl"
        self.discarded = self.path / "metrics.discarded.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"
        self.launcher_log = self.logs / "launcher.log"
        self.error = self.path / "error.json"
        self.result = self.path / "result.json"
        self.stop_wish, self.save_wish = self.path / "STOP", self.path / "SAVE"  # left by any other shell
        self.attempt = 0  # set by begin_attempt
        self._fields: dict[str, Any] = {}
        self._lock = FileLock(self.path / ".lock", timeout=0)

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank_{rank:05d}.log"

    def create(self) -> None:
        """Make the folder and see that it can be written."""
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe_{socket.gethostname()}_{os.getpid()}"
            probe.write_text("x")
            probe.unlink()
        except OSError as error:
            raise RunDirError(
                f"Run directory {self.path} cannot be written: {error.strerror}. "
                f"Choose another place with runs_dir or DIST_TRAIN_RUNS_DIR."
            ) from None

    def check_config(self, config: Config) -> None:
        """Refuse a directory that belongs to another config; nothing is written.

        Raises:
            ConfigError: with the settings that differ and what each side has.
        """
        if not self.config.exists() or not any(self.checkpoints.glob("*step_*")):
            return  # nothing of another run could be lost: a start that was refused leaves its name free
        difference = load_config(str(self.config)).result_diff(config)
        if difference:
            lines = [f"  {key}: {old} there, {new} now" for key, (old, new) in sorted(difference.items())]
            raise ConfigError(
                f"{self.path} belongs to a run with other settings:\n" + "\n".join(lines) + "\n"
                "Give the new run a name of its own with --run-name, or undo the change."
            )

    def lock(self) -> None:
        """Take the directory for this process. Two starts on one host: the second is refused."""
        try:
            self._lock.acquire()
        except (Timeout, OSError):
            status = self.read_status()
            raise RunDirError(
                f"{self.path} is in use by process {status.get('pid')} on {status.get('host')} "
                f"(attempt {status.get('attempt')}, state {status.get('state')}). "
                f"Wait for it, stop it, or start under another --run-name."
            ) from None

    def unlock(self) -> None:
        self._lock.release()

    def begin_attempt(self, config: Config, wandb_id: str) -> None:
        """Number this start of the run and write config.yaml. Needs the lock. `wandb_id` counts on the first one."""
        before = self.read_status()
        self.attempt = int(before.get("attempt", 0)) + 1
        self._fields = {
            "attempt": self.attempt,
            "wandb_id": before.get("wandb_id") or wandb_id,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "slurm_job_id": slurm_job(os.environ),
            "slurm_restart_count": os.environ.get("SLURM_RESTART_COUNT"),
            **{name: before[name] for name in ("resumed_at", "fruitless_starts") if name in before},
        }
        for stale in (self.error, self.result, self.stop_wish, self.save_wish):
            stale.unlink(missing_ok=True)
        write_atomically(self.config, to_yaml(config))
        self.set_status(state="STARTING")

    def note_resume(self, step: int, world_size: int) -> None:
        """Where this attempt begins; and how many before it, in a row, have begun there and saved nothing further."""
        fruitless = self._fields.get("fruitless_starts", 0) + 1 if self._fields.get("resumed_at") == step else 0
        self.set_status(state="SETUP", world_size=world_size, resumed_at=step, fruitless_starts=fruitless)

    def check_not_superseded(self) -> None:
        """A later attempt of the run owns the directory from its first status on; an older one must not write.

        Raises:
            RunDirError: this attempt was superseded.
        """
        current = int(self.read_status().get("attempt", 0))
        if current > self.attempt:
            raise RunDirError(f"{self.path}: attempt {self.attempt} was superseded by attempt {current}.")

    def set_status(self, **fields: Any) -> None:
        """Update status.json; the heartbeat is now."""
        self.check_not_superseded()
        self._fields |= fields
        write_json(self.status, self._fields | {"heartbeat": round(time.time(), 3)}, durable=False)

    def pop_wish(self, path: Path) -> str | None:
        """What somebody wrote into this file, which is gone after it; None if there is none."""
        try:
            found = path.read_text()
            path.unlink()
        except OSError:
            return None
        return found

    def read_status(self) -> dict[str, Any]:
        return read_json(self.status)

    # --- metrics.jsonl -----------------------------------------------------------------------------------------

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(to_json(line) + "\n")

    def sync_metrics(self) -> None:
        """Metrics up to a checkpoint are on the disk before the checkpoint is."""
        if self.metrics.exists():
            with self.metrics.open("rb") as file:
                os.fsync(file.fileno())

    def read_metrics(self) -> Iterator[dict[str, Any]]:
        """The lines in order; a last line that a kill cut short is left out."""
        text = self.metrics.read_text(encoding="utf-8") if self.metrics.exists() else ""
        yield from map(json.loads, text.split("\n")[:-1])

    def cut_metrics(self, step: int, *, evaluation_pending: bool = False) -> int:
        """Set aside the lines after `step`, which the resumed run writes again. Returns how many.

        `evaluation_pending`: so is the `val` line of `step` itself, which an earlier resume may have written.
        """
        if not self.metrics.exists():
            return 0
        lines = self.metrics.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        good = 0  # up to the first line that is later, or no line at all: a kill or a power cut may have left anything
        while good < len(lines) and _step_of(lines[good]) <= step:
            if evaluation_pending and _step_of(lines[good]) == step and "val/loss" in json.loads(lines[good]):
                break
            good += 1
        if cut := lines[good:]:
            with self.discarded.open("a", encoding="utf-8") as file:
                file.write("".join(cut).rstrip("\n") + "\n")
            write_atomically(self.metrics, "".join(lines[:good]))
        return len(cut)

    def check_room(self, needed_bytes: int) -> None:
        """See that a first checkpoint fits.

        Raises:
            RunDirError: naming what is needed and what is free.
        """
        free = shutil.disk_usage(self.path).free
        if free < needed_bytes:
            raise RunDirError(
                f"A checkpoint needs {needed_bytes / 2**20:.1f} MiB and {self.path} has {free / 2**20:.1f} MiB free. "
                f"Make room, or choose another place with runs_dir or DIST_TRAIN_RUNS_DIR."
            )


def _step_of(line: str) -> float:
    """The step of a line of metrics, infinite if it is not a whole one."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def _where(error: BaseException) -> str:
    """The innermost line of code that an unforeseen error comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def to_json(value: Any) -> str:
    """Strict JSON on one line: no NaN, no Infinity."""
    return json.dumps(value, allow_nan=False)


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    text = json.dumps(value, allow_nan=False, indent=1)
    write_atomically(path, text + "\n", durable=durable)


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, or {} where there is none yet."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_atomically(path: Path, text: str, *, durable: bool = True) -> None:
    """The old file or the whole new one is there at any moment; `durable` also survives a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
        temporary.unlink(missing_ok=True)
