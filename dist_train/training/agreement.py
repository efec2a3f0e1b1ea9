"""Ranks decide together: stop, save by the clock, give up. One small collective about every second."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch

from dist_train.distributed.scheduler import Scheduler
from dist_train.distributed.signals import StopReason, StopRequest, StopState
from dist_train.errors import DistTrainError
from dist_train.runs.directory import RunDir

if TYPE_CHECKING:
    from dist_train.distributed.world import World

HEARTBEAT_S = 5.0
_WISHES: tuple[StopReason | None, ...] = (None, "TERM", "INTERRUPT", "PREEMPTED")


class Agreement:
    """What all ranks have agreed on. `tick` counts units of work that all ranks do in the same order.

    A rank alone must never act on what only it knows (a signal, the clock): the others would wait for it in their
    next collective for ever.
    """

    def __init__(
        self,
        world: World,
        request: StopRequest,
        run_dir: RunDir | None = None,
        scheduler: Scheduler | None = None,
        poll: Callable[[], DistTrainError | None] = lambda: None,
        on_agreed: Callable[[], None] = lambda: None,
        save_every_s: float = 0.0,
        interval_s: float = 1.0,
    ) -> None:
        """Rank zero looks for STOP and SAVE in `run_dir`, and asks `scheduler` what a TERM meant.

        `poll` is asked on rank zero for an error that all ranks must end with; `on_agreed` is called on every rank.
        """
        self.stop: StopState | None = None
        self.save_due = False
        self._world = world
        self._request = request
        self._run_dir = run_dir
        self._scheduler = scheduler or Scheduler()
        self._poll = poll
        self._on_agreed = on_agreed
        self._save_every_s = save_every_s
        self._interval_s = interval_s
        self._last_save = self._last_beat = self._timed_from = time.monotonic()
        self._ticks = 0  # since the last agreement
        self._timed_ticks = 0  # those of them since `_timed_from`
        self._distance = {"train": 1, "evaluate": 1}

    def start_phase(self) -> None:
        """Time before this (set-up, a save) says nothing about the pace of the work after it.

        The ticks before it count all the same: where saves are more frequent than agreements, those must still come.
        """
        self._timed_from = time.monotonic()
        self._timed_ticks = 0

    def tick(self, phase: Literal["train", "evaluate"] = "train") -> None:
        """One more step or batch is done; every so many of them, agree.

        The distance between agreements is set from the pace of the slowest rank, so that a signal is noticed within
        about a second and the step does not pay for it.

        Collective: every rank must call this.

        Raises:
            DistTrainError: on every rank, if rank zero has learned of one.
        """
        self._ticks += 1
        self._timed_ticks += 1
        if self._ticks < self._distance[phase]:
            return
        now = time.monotonic()
        pace = (now - self._timed_from) / self._timed_ticks
        save = self._world.is_rank_zero and self._look_around(now)
        error = self._poll() if self._world.is_rank_zero else None
        told, save_due, failed, slowest = self._reduce(
            float(_WISHES.index(self._request.requested)), float(save), float(error is not None), pace
        )
        if failed:
            self._world.on_rank_zero(lambda: _raise(error))
        self._on_agreed()
        wish = _WISHES[round(told)]
        self.stop = self._world.on_rank_zero(self._scheduler.classify_sigterm) if wish == "TERM" else wish
        self.save_due = self.save_due or bool(save_due)
        # At most four times further than last time: a first pace may be a lucky one.
        self._distance[phase] = max(1, min(4 * self._distance[phase], int(self._interval_s / max(slowest, 1e-9))))
        self._ticks = 0
        self.start_phase()

    def saved(self) -> None:
        self.save_due = False
        self._last_save = time.monotonic()
        self.start_phase()

    def _look_around(self, now: float) -> bool:
        """Whether a save is due, by the clock or by another shell's wish; passes on a wish to stop. Rank zero only."""
        by_clock = 0 < self._save_every_s <= now - self._last_save
        if self._run_dir is None:
            return by_clock
        if now - self._last_beat >= HEARTBEAT_S:
            self._run_dir.set_status()
            self._last_beat = now
        if self._scheduler.stop_file is not None and self._scheduler.stop_file.exists():
            self._request.request("PREEMPTED")
        stop = self._run_dir.take_request(self._run_dir.stop_request_file)
        if stop is not None:
            self._request.request("PREEMPTED" if stop.strip() == "PREEMPTED" else "INTERRUPT")
        return self._run_dir.take_request(self._run_dir.save_request_file) is not None or by_clock

    def _reduce(self, *values: float) -> list[float]:
        if self._world.size == 1:
            return list(values)
        told = torch.tensor(values, dtype=torch.float32, device=self._world.device)
        result: list[float] = self._world.all_reduce(told, "max").tolist()
        return result


def _raise(error: DistTrainError | None) -> None:
    if error is not None:
        raise error
