"""Collective decisions: stop, save on a timer, fail. They cost one small collective about every second."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch

from dist_train.distributed.job_scheduler import JobScheduler
from dist_train.distributed.signals import StopReason, StopRequest, StopState
from dist_train.errors import DistTrainError
from dist_train.runs import heartbeat
from dist_train.runs.directory import RunDir

if TYPE_CHECKING:
    from dist_train.distributed.world import World

_STOP_REASONS: tuple[StopReason | None, ...] = (None, "TERM", "INTERRUPT", "PREEMPTED")


class Agreement:
    """The decisions shared by all ranks. `tick` counts units of work that all ranks do in the same order.

    A rank must never act alone on what only it knows (a signal, its clock): the others would wait for it forever in
    their next collective.
    """

    def __init__(
        self,
        world: World,
        request: StopRequest,
        run_dir: RunDir | None = None,
        scheduler: JobScheduler | None = None,
        poll: Callable[[], DistTrainError | None] = lambda: None,
        on_agreed: Callable[[], None] = lambda: None,
        save_every_s: float = 0.0,
        interval_s: float = 1.0,
    ) -> None:
        """Rank zero looks for the files STOP and SAVE in `run_dir`, and asks `scheduler` what a TERM meant.

        `poll` is called on rank zero and returns an error that must end all ranks; `on_agreed` is called on every rank.
        """
        self.stop: StopState | None = None
        self.save_due = False
        self._world = world
        self._request = request
        self._run_dir = run_dir
        self._scheduler = scheduler or JobScheduler()
        self._poll = poll
        self._on_agreed = on_agreed
        self._save_every_s = save_every_s
        self._interval_s = interval_s
        self._last_save = self._last_beat = self._timed_from = time.monotonic()
        self._ticks = 0  # since the last agreement
        self._timed_ticks = 0  # of these, since `_timed_from`
        self._interval_ticks = {"train": 1, "evaluate": 1}

    def start_phase(self) -> None:
        """Exclude the time before this call (set-up, a save) from the measured time per tick.

        Earlier ticks still count towards the next agreement, which must happen even if saves are more frequent.
        """
        self._timed_from = time.monotonic()
        self._timed_ticks = 0

    def tick(self, phase: Literal["train", "evaluate"] = "train") -> None:
        """Count one finished step or batch, and agree after every few of them.

        The interval follows the time per tick of the slowest rank, so that a signal is noticed within about a second
        without slowing down the steps.

        Collective: every rank must call this.

        Raises:
            DistTrainError: on every rank, if `poll` returned one on rank zero.
        """
        self._ticks += 1
        self._timed_ticks += 1
        if self._ticks < self._interval_ticks[phase]:
            return
        now = time.monotonic()
        tick_s = (now - self._timed_from) / self._timed_ticks
        save = self._world.is_rank_zero and self._check_requests(now)
        error = self._poll() if self._world.is_rank_zero else None
        reason_index, save_due, failed, slowest_s = self._reduce(
            float(_STOP_REASONS.index(self._request.requested)), float(save), float(error is not None), tick_s
        )
        if failed:
            self._world.on_rank_zero(lambda: _raise(error))
        self._on_agreed()
        reason = _STOP_REASONS[round(reason_index)]
        self.stop = self._world.on_rank_zero(self._scheduler.classify_sigterm) if reason == "TERM" else reason
        self.save_due = self.save_due or bool(save_due)
        # Grows at most fourfold: the first measurement may be too fast.
        wanted = int(self._interval_s / max(slowest_s, 1e-9))
        self._interval_ticks[phase] = max(1, min(4 * self._interval_ticks[phase], wanted))
        self._ticks = 0
        self.start_phase()

    def saved(self) -> None:
        """Note that a save is done: none is due now, and the timer starts again."""
        self.save_due = False
        self._last_save = time.monotonic()
        self.start_phase()

    def _check_requests(self, now: float) -> bool:
        """Return whether a save is due, by the timer or the SAVE file; forward stop requests. Rank zero only."""
        by_timer = 0 < self._save_every_s <= now - self._last_save
        if self._run_dir is None:
            return by_timer
        if now - self._last_beat >= heartbeat.EVERY_S:
            self._run_dir.status.update()
            self._last_beat = now
        if self._scheduler.stop_file is not None and self._scheduler.stop_file.exists():
            self._request.request("PREEMPTED")
        stop = self._run_dir.take_request(self._run_dir.stop_request_file)
        if stop is not None:
            self._request.request("PREEMPTED" if stop.strip() == "PREEMPTED" else "INTERRUPT")
        return self._run_dir.take_request(self._run_dir.save_request_file) is not None or by_timer

    def _reduce(self, *values: float) -> list[float]:
        if self._world.size == 1:
            return list(values)
        local = torch.tensor(values, dtype=torch.float32, device=self._world.device)
        result: list[float] = self._world.all_reduce(local, "max").tolist()
        return result


def _raise(error: DistTrainError | None) -> None:
    if error is not None:
        raise error
