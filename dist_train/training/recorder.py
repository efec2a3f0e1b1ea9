"""The records of a run: metric lines, its status, and at the end its result."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from typing import Any

from dist_train.checkpoints.contents import TrainerState
from dist_train.config.schema import Config
from dist_train.distributed import watchdog
from dist_train.distributed.devices import peak_memory_gib
from dist_train.distributed.world import World
from dist_train.runs.directory import RunDir
from dist_train.runs.progress import Screen
from dist_train.runs.records import State
from dist_train.runs.time_accounting import effective_ratio
from dist_train.training.final_evaluation import FinalEvaluation
from dist_train.training.pictures import Pictures
from dist_train.training.step.train_step import Step
from dist_train.training.tracking import Tracker

_log = logging.getLogger(__name__)


@dataclass
class RunRecorder:
    """Writes the records of a run. Exists on all ranks; only rank zero writes."""

    config: Config
    world: World
    run_dir: RunDir
    step: Step
    state: TrainerState
    tracker: Tracker
    screen: Screen
    total_steps: int
    steps_per_epoch: int
    started: float  # time.perf_counter() at the start of the process

    def __post_init__(self) -> None:
        self._newest: dict[str, Any] = {}  # the last value of each metric
        draws = self.world.is_rank_zero and self.config.tracking.pictures
        self._pictures = Pictures(self.run_dir) if draws else None
        self._evaluated_at = time.perf_counter()
        self._virtual_start = self.started - self.state.total_s

    @property
    def total_s(self) -> float:
        """Seconds in all attempts so far."""
        return time.perf_counter() - self._virtual_start

    def set_state(self, state: State) -> None:
        self._set_status(state=state)

    def record_brief_state(self, state: State) -> None:
        """Count the time from now on as that of `state`, without a write of status.json at once, which takes longer."""
        if self.world.is_rank_zero:
            self.run_dir.status.record(state=state, **self._progress())

    def log_train(self, totals: dict[str, float], lr: float, perf: dict[str, float]) -> None:
        """Write one `train` line. `totals`: sums over the window since the last; `perf`: its perf/... metrics."""
        line = self._line()
        line["train/loss"] = totals["loss"] / totals["seen"]
        if self.step.window.classifies:
            line["train/accuracy"] = totals["correct"] / totals["seen"]
        line |= {
            "train/lr": lr,
            "train/grad_norm": _finite(self.step.grad_norm()),
            **perf,
            "perf/peak_memory_gib": round(peak_memory_gib(self.world.device), 4),
        }
        if "overflows" in totals:
            line["train/overflows"] = totals["overflows"]
        self.tracker.log(line)
        self.screen.show_training(line)
        self._record_newest(line)

    def log_epoch_audit(self, coverage: dict[str, int]) -> None:
        """Write one `audit` line."""
        self.tracker.log(self._line() | coverage)

    def log_eval(self, seconds: float) -> None:
        """Write one `val` line with the evaluation that `state` has just recorded."""
        now = time.perf_counter()
        line = self._line() | self.state.val
        line |= {
            "perf/eval_samples_per_s": round(line["val/seen"] / seconds, 1),
            "epoch_s": round(now - self._evaluated_at, 3),
        }
        self._evaluated_at = now
        self.tracker.log(line)
        self.screen.show_evaluation(line)
        self._record_newest(line)

    def begin_final_evaluation(self) -> None:
        """Record that the last step is done: all lines that curves show are written."""
        self.set_state("EVALUATING")
        if self._pictures is not None:
            self._pictures.begin()

    def stop(self, end: State) -> None:
        """Record that the run stopped early. Its last checkpoint is already on the disk.

        Collective: every rank must call this.
        """
        self.world.on_rank_zero(lambda: self.set_state(end))
        watchdog.disarm()
        self.tracker.finish({})
        _log.info(
            "saved and stopped at step %d of %d, state %s. To resume: the same command with --run-name=%s",
            self.state.step, self.total_steps, end, self.run_dir.path.name,
        )  # fmt: skip

    def finish(self, final: FinalEvaluation, **extra: Any) -> None:
        """Write result.json, with the `extra` fields of the loop, then the pictures.

        Collective: every rank must call this.
        """
        results = self._results(final, extra)
        self.world.on_rank_zero(lambda: self.run_dir.write_result(results))
        self.world.on_rank_zero(lambda: self.set_state("FINISHED"))
        watchdog.disarm()  # the rest may take long and cannot change the result
        self.tracker.finish(results, self._pictures.finish(final) if self._pictures is not None else {})

    def _results(self, final: FinalEvaluation, extra: dict[str, Any]) -> dict[str, Any]:
        """Return the content of result.json."""
        state, world = self.state, self.world
        samples = state.step * self.config.global_batch_size
        seconds = self.run_dir.status.time_accounting.totals()  # wall time during and between all attempts
        if world.is_rank_zero:
            _log.debug("seconds by use: %s", ", ".join(f"{use} {spent:.1f}" for use, spent in seconds.items()))
        return {
            "state": "FINISHED",
            "step": state.step,
            "epoch": state.step / self.steps_per_epoch,
            "attempt": self.run_dir.status.attempt,
            "world_size": world.size,
            "global_batch_size": self.config.global_batch_size,
            "mixed_precision": world.mixed_precision,
            **extra,
            "step_mode": self.step.mode,
            "warm_up_s": round(self.step.warm_up_s, 3),  # of this attempt, compiling included
            "train_s": round(state.train_s, 3),
            "samples_per_s": round(samples / state.train_s, 1) if state.train_s else None,
            "total_s": round(self.total_s, 3),
            "seconds": seconds,
            "effective_training_time": round(effective_ratio(seconds), 4),
            **{name: value for name, value in state.val.items() if name != "step"},
            **final.metrics,
            **{f"best/{name.removeprefix('val/')}": value for name, value in state.best.items()},
        }

    def _line(self) -> dict[str, Any]:
        step = self.state.step
        return {
            "step": step,
            "epoch": step / self.steps_per_epoch,
            "samples": step * self.config.global_batch_size,
            "attempt": self.run_dir.status.attempt,
            "time": round(time.time(), 3),
        }

    def _record_newest(self, line: dict[str, Any]) -> None:
        self._newest |= {name: value for name, value in line.items() if "/" in name}
        self._set_status(metrics=self._newest)

    def _set_status(self, **fields: Any) -> None:
        if self.world.is_rank_zero:
            self.run_dir.status.update(**self._progress(), **fields)

    def _progress(self) -> dict[str, Any]:
        return {
            "step": self.state.step,
            "total_steps": self.total_steps,
            "epoch": self.state.step / self.steps_per_epoch,
            "data_wait_s": round(self.step.data_wait_s, 3),
            "best": self.state.best,
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # strict JSON has no NaN, the result of an fp16 overflow
