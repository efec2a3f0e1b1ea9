"""Preemption of a Slurm job.

In a rank: what a SIGTERM means (training/agreement.py asks) and whether a save fits the grace time. In the batch shell,
after the step has ended: whether to requeue the job.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

from dist_train.distributed.job_scheduler import JobScheduler
from dist_train.distributed.process_info import slurm_job
from dist_train.distributed.signals import StopState
from dist_train.errors import LaunchError, PeerLost
from dist_train.launch.slurm.commands import ask
from dist_train.runs.directory import RunDir
from dist_train.runs.error_report import describe_error

_log = logging.getLogger(__name__)
_STOP_FILE = "DIST_TRAIN_STOP_FILE"  # set by the batch shell for rank zero
_MAX_FRUITLESS = 2  # after this many starts in a row without a new checkpoint, the next failure is final


class SlurmScheduler(JobScheduler):
    """The scheduler of a Slurm job, whose variables are in `env`."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = env
        self.stop_file = Path(env[_STOP_FILE]) if slurm_job(env) and env.get(_STOP_FILE) else None

    def classify_sigterm(self) -> StopState:
        """Return PREEMPTED while the job is still running, else INTERRUPT: the job is cancelled.

        Slurm itself does not requeue a job that ends within the grace time of a preemption.
        """
        job = slurm_job(self._env)
        if job is None or not self._env.get("SLURM_STEP_ID"):
            return "INTERRUPT"
        try:
            still_running = "JobState=RUNNING" in _describe(job)
        except LaunchError:
            return "PREEMPTED"  # cancelling a job takes a reachable controller
        return "PREEMPTED" if still_running else "INTERRUPT"

    def on_first_save(self, save_s: float) -> None:
        # In a separate thread: a stop must not wait for Slurm's answer.
        threading.Thread(target=check_save_time, args=(save_s, self._env), daemon=True).start()


def check_save_time(save_s: float, env: Mapping[str, str]) -> None:
    """Warn if a preemption would not leave this job enough time to save."""
    partition = env.get("SLURM_JOB_PARTITION")
    if slurm_job(env) is None or not partition:
        return
    with suppress(LaunchError):
        limits = dict(
            word.partition("=")[::2] for word in ask("scontrol", "show", "partition", partition, timeout_s=5.0).split()
        )
        kill_wait = re.search(r"^KillWait\s*=\s*(\d+)", ask("scontrol", "show", "config", timeout_s=5.0), re.MULTILINE)
        if limits.get("PreemptMode", "OFF") == "OFF" or kill_wait is None:
            return
        grace_s, kill_wait_s = int(limits.get("GraceTime", 0)), int(kill_wait[1])
        if save_s > grace_s + kill_wait_s:
            _log.warning(
                "a save takes %.0f s, and partition %s leaves a preempted job %d s (GraceTime=%d + KillWait=%d): it "
                "would resume from the last periodic save. Ask for a longer GraceTime, or lower save_every.",
                save_s, partition, grace_s + kill_wait_s, grace_s, kill_wait_s,
            )  # fmt: skip


Decision = Literal["requeue", "ended", "failed"]


def decide_requeue(
    run_dir: RunDir, env: Mapping[str, str], max_requeues: int, *, stop_requested: bool = False
) -> tuple[Decision, str]:
    """Decide whether to requeue a job whose step has ended, and why, by the run's own state, not by exit codes.

    `stop_requested`: the batch shell was asked to stop, by the time limit or by a user, maybe before the ranks
    could hear it.
    """
    status = run_dir.status.read()
    state, error = status.get("state"), run_dir.read_error()
    restarts = int(env.get("SLURM_RESTART_COUNT") or 0)
    if state == "FINISHED":
        return "ended", "state FINISHED"
    if error and error.get("kind") != PeerLost.__name__:
        return "failed", describe_error(error)
    last_start = status.get("slurm_job_id"), int(status.get("slurm_restart_count") or 0)
    if state is None or last_start != (slurm_job(env), restarts):
        state, why = "PREEMPTED", "asked to stop before training began"
        if not is_preempted(env):
            if not stop_requested:
                return "failed", "this start ended before training began"
            unbegun = restarts - last_start[1] if last_start[0] == slurm_job(env) else restarts + 1
            if unbegun > _MAX_FRUITLESS:
                return "failed", f"{why}, {unbegun} starts in a row. Request more --time."
    elif state == "INTERRUPT":
        return "ended", "state INTERRUPT"
    else:
        why = f"state {state}" if state == "PREEMPTED" else "a rank or its node was lost"
    if state != "PREEMPTED" and status.get("fruitless_starts", 0) >= _MAX_FRUITLESS:
        return "failed", f"{why}; {_MAX_FRUITLESS + 1} starts in a row ended without a new checkpoint"
    if restarts >= max_requeues:
        return "failed", f"{why}, but this was start {restarts + 1} and --max-requeues={max_requeues}"
    return "requeue", why


def is_preempted(env: Mapping[str, str]) -> bool:
    """Return whether a job of higher priority has claimed this job's nodes."""
    with suppress(LaunchError):
        record = _describe(slurm_job(env) or "")
        return any(word.startswith("PreemptTime=") and word != "PreemptTime=None" for word in record)
    return False


def _describe(job: str) -> list[str]:
    """Return the controller's record of a job, as KEY=VALUE words.

    Raises:
        LaunchError: the controller does not answer, or has no record of the job.
    """
    return ask("scontrol", "show", "job", "--oneliner", job, timeout_s=5.0).split()
