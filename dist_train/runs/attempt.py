"""The beginning of an attempt: its number, what it takes over from earlier ones, and what it clears away."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from typing import Any

from dist_train.atomic_files import remove_leftovers
from dist_train.config.schema import Config
from dist_train.distributed.process_info import REQUEUED, slurm_job
from dist_train.errors import ConfigError
from dist_train.runs.directory import RunDir
from dist_train.runs.extension import with_extension
from dist_train.runs.status_file import is_of_earlier_start
from dist_train.runs.time_accounting import TimeAccounting


def begin_attempt(
    run_dir: RunDir,
    config: Config,
    wandb_id: str,
    started: float | None = None,
    asked_at: float | None = None,
    *,
    extend: bool = False,
) -> None:
    """Number this attempt and write config.yaml. Needs the lock. `wandb_id` is used by the first attempt only.

    `started`: time.perf_counter() when the process started; `asked_at`: when the command was given; `extend`: the run
    may go on for longer than before.
    """
    started = time.perf_counter() if started is None else started
    # status.json, or a part of it, may be lost to a power cut; run.json is older, but synced.
    before = run_dir.read_provenance() | run_dir.status.read()
    attempt = before.get("attempt", 0) + 1
    if _belongs_to_other_config(run_dir, config):
        before = {}
    last_seen = before.get("heartbeat") or run_dir.read_submission().get("submitted") or time.time()
    if before.get("state") == "FINISHED":
        last_seen = time.time()  # until it was extended, it was not to train
    reached = max(before.get("reached", 0), before.get("step", 0))  # of all attempts: one may die in its set-up
    time_accounting = TimeAccounting(
        before.get("seconds", {}),
        down_s=time.time() - (time.perf_counter() - started) - last_seen,
        reached=reached,
        started=started,
    )
    fields: dict[str, Any] = {
        "attempt": attempt,
        "reached": reached,
        "wandb_id": before.get("wandb_id") or wandb_id,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "slurm_job_id": slurm_job(os.environ),
        "slurm_restart_count": os.environ.get("SLURM_RESTART_COUNT"),
        **{name: before[name] for name in ("resumed_at", "fruitless_starts") if name in before},
    }
    run_dir.status.begin(fields, time_accounting)
    if extend and (changes := run_dir.extension_to(config)):
        run_dir.status.update(state="STARTING")  # first: a run with the state FINISHED is not begun again
        run_dir.write_provenance(with_extension(run_dir.read_provenance(), run_dir.saved_step, changes))
    for stale in (run_dir.error, run_dir.result):
        stale.unlink(missing_ok=True)
    run_dir.write_config(config)
    _remove_stale_requests(run_dir, started if asked_at is None else asked_at)
    run_dir.status.update(state="STARTING")
    _remove_leftovers(run_dir)


def _belongs_to_other_config(run_dir: RunDir, config: Config) -> bool:
    """Whether the directory is of a run with other settings that left no checkpoint (see `RunDir.check_config`)."""
    if run_dir.holds_checkpoints:
        return False
    try:
        return run_dir.config.exists() and bool(run_dir.differences_to(config))
    except ConfigError:  # damaged
        return True


def _remove_stale_requests(run_dir: RunDir, asked_at: float) -> None:
    """Remove a STOP and a SAVE file that were meant for an earlier start. config.yaml has just been written.

    A file is meant for this start if it is newer than the command; for a job, newer than its submission; for a
    requeued or restarted run, newer than its last status. Uses file modification times.
    """
    status = run_dir.status
    if is_of_earlier_start(status.read(), os.environ) or REQUEUED in os.environ:
        since = status.path.stat().st_mtime if status.path.exists() else 0.0
    elif slurm_job(os.environ) is not None and run_dir.read_submission().get("job") == slurm_job(os.environ):
        since = run_dir.slurm_json.stat().st_mtime
    else:
        since = run_dir.config.stat().st_mtime - (time.perf_counter() - asked_at)
    for request_file in (run_dir.stop_request_file, run_dir.save_request_file):
        with suppress(OSError):
            if request_file.stat().st_mtime < since:
                request_file.unlink()


def _remove_leftovers(run_dir: RunDir) -> None:
    """Remove incomplete files of starts that were killed."""
    remove_leftovers(run_dir.path)
    for stale in (*run_dir.path.glob(".probe_*"), *run_dir.path.glob(".token_*")):
        stale.unlink(missing_ok=True)
