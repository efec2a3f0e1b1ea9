"""The loop: while there are steps left and nobody told us to stop: take the step; sometimes log, evaluate, save."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from typing import Any

from dist_train import watchdog
from dist_train.agreement import Agreement
from dist_train.audit import ShardAudit
from dist_train.checkpoints import Checkpoints
from dist_train.config import Config
from dist_train.confusion import Confusion
from dist_train.data import Splits
from dist_train.data.evaluation_batches import EvaluationBatches, evaluation_batches
from dist_train.data.image_set import Examples
from dist_train.distributed import World
from dist_train.errors import TrainingDiverged
from dist_train.evaluate import evaluate
from dist_train.final_passes import FinalPasses, draw, final_passes
from dist_train.metrics import Overflows, Pace, peak_memory_gib
from dist_train.progress import Screen
from dist_train.run_dir import RunDir, State
from dist_train.schedule import LearningRate, is_due
from dist_train.step import Step
from dist_train.time_sheet import effective_ratio
from dist_train.tracking import Tracker
from dist_train.train_state import TrainState

_HOPELESS = 50  # updates in a row that fp16 left out; each has halved the scale

_log = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything that takes part in one attempt of a run, and what it does besides stepping."""

    config: Config
    world: World
    run_dir: RunDir
    splits: Splits
    step: Step
    state: TrainState
    checkpoints: Checkpoints
    tracker: Tracker
    screen: Screen
    agreement: Agreement
    learning_rate: LearningRate
    audit: ShardAudit
    steps_per_epoch: int
    started: float  # time.perf_counter() when the process began

    def __post_init__(self) -> None:
        self.total_steps = self.learning_rate.total_steps
        every = (self.config.log_every, self.config.eval_every, self.config.save_every)
        self.log_every, self.eval_every, self.save_every = (
            0 if duration.unit == "s" else duration.to_steps(self.steps_per_epoch) for duration in every
        )
        stopping = self.config.early_stop  # a run that had stopped early has not more to do after a resume
        self.early_stopped = stopping is not None and self.state.evaluations_without_gain >= stopping.patience
        self.val = self.batches_of(self.splits.val) if self.splits.val is not None else None
        self._newest: dict[str, Any] = {}  # of each metric the last value
        self._pace = Pace(self.state.train_s)
        self._evaluated_at = time.perf_counter()
        self._before = self.started - self.state.total_s

    def __enter__(self) -> Run:
        self.screen.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.screen.__exit__(*error)
        self.checkpoints.close()

    def train(self) -> State:
        """To the end of the schedule, or to an agreed stop; the last state is saved either way.

        Collective: every rank must call this.
        """
        state, step, agreement = self.state, self.step, self.agreement
        if state.evaluation_pending:
            self.evaluate()
            if state.is_best:
                self.save()
        self.enter("TRAINING")
        self._lap()
        while state.step < self.total_steps and not agreement.stop and not self.early_stopped:
            step.take(state.step)
            state.step += 1
            agreement.tick()

            # Only below does the host wait for the device.
            if is_due(state.step, self.log_every, self.total_steps):
                self.log()
            if is_due(state.step, self.steps_per_epoch, self.total_steps):
                self.close_epoch()
            if is_due(state.step, self.eval_every, self.total_steps):
                self.evaluate()
            if self.save_is_due():
                self.save()

        if self.checkpoints.saved_step != state.step:
            self.save()
        self._pause()
        return self.finish()

    def log(self) -> None:
        """One `train` line over the window since the last.

        Collective: every rank must call this.

        Raises:
            TrainingDiverged: on every rank, if the window's loss is not finite.
        """
        state = self.state
        totals = self.step.pop_window()
        if not math.isfinite(totals["loss"]):
            raise TrainingDiverged(
                f"The loss is not finite between step {state.logged_step + 1} and {state.step}. The last good "
                f"checkpoint is {self.checkpoints.describe_last()}. Lower optimizer.lr or set max_grad_norm."
            )
        line = self._line()
        line["train/loss"] = totals["loss"] / totals["seen"]
        if self.step.window.classifies:
            line["train/accuracy"] = totals["correct"] / totals["seen"]
        line |= {
            "train/lr": self.learning_rate.at(state.step - 1),
            "train/grad_norm": _finite(self.step.grad_norm()),
            **self._pace.measure(state.step, self.step.data_wait_s, self.config.global_batch_size),
            "perf/peak_memory_gib": round(peak_memory_gib(self.world.device), 4),
        }
        if self.step.eager.overflows is not None:
            line["train/overflows"] = self._count_overflows(self.step.eager.overflows)
        state.logged_step = state.step
        self._lap()
        self.tracker.log(line)
        self.screen.show_training(line)
        self._newest |= _metrics_of(line)
        self.set_status(metrics=self._newest)

    def _count_overflows(self, overflows: Overflows) -> int:
        count, in_a_row = overflows.pop()
        if in_a_row >= _HOPELESS:
            raise TrainingDiverged(
                f"Between step {self.state.logged_step + 1} and {self.state.step} fp16 left out {in_a_row} updates in "
                f"a row: their gradients were not finite at any scale. The last good checkpoint is "
                f"{self.checkpoints.describe_last()}. Lower optimizer.lr, set max_grad_norm, or use "
                f"mixed_precision=bf16."
            )
        return count

    def close_epoch(self) -> None:
        """One `audit` line: what the epoch, or the part of it that the run ends with, trained on.

        Collective: every rank must call this.

        Raises:
            DistTrainError: on every rank, if an example was trained on twice.
        """
        epoch = math.ceil(self.state.step / self.steps_per_epoch)
        found = self.audit.close_epoch(epoch)
        self.tracker.log(self._line() | found)
        _log.debug(
            "epoch %d: %d examples, none twice, %d dropped", epoch, found["audit/unique"], found["audit/dropped"]
        )

    def evaluate(self) -> None:
        """One `val` line; a stop agreed meanwhile leaves it to the resumed run.

        Collective: every rank must call this.
        """
        if self.val is None:
            return
        self._pause()
        self.state.evaluation_pending = True
        if not self.agreement.stop:
            self.enter("EVALUATING")
            started = time.perf_counter()
            found = self.evaluate_split(self.val)
            if found is not None:
                seconds = time.perf_counter() - started
                self._note_evaluation({f"val/{name}": value for name, value in found.items()}, seconds)
            self.enter("EVALUATED")
        self._go_on()

    def _note_evaluation(self, metrics: dict[str, float], seconds: float) -> None:
        stopping = self.config.early_stop
        self.state.note_evaluation(metrics, stopping.min_delta if stopping else 0.0)
        self.early_stopped = stopping is not None and self.state.evaluations_without_gain >= stopping.patience
        now = time.perf_counter()
        line = self._line() | metrics
        line |= {
            "perf/eval_samples_per_s": round(metrics["val/seen"] / seconds, 1),
            "epoch_s": round(now - self._evaluated_at, 3),
        }
        self._evaluated_at = now
        self.tracker.log(line)
        self.screen.show_evaluation(line)
        self._newest |= _metrics_of(line)
        self.set_status(metrics=self._newest)
        if self.early_stopped:
            _log.info("no gain in %d evaluations: early stop", self.state.evaluations_without_gain)

    def evaluate_split(self, batches: EvaluationBatches, confusion: Confusion | None = None) -> dict[str, float] | None:
        """Collective: every rank must call this."""
        self.agreement.start_phase()
        net, objective = self.step.evaluated_net, self.step.evaluation_objective
        return evaluate(net, batches, objective, self.world, self.agreement, confusion)

    def batches_of(self, examples: Examples) -> EvaluationBatches:
        return evaluation_batches(examples, self.step.net, self.world, self.config)

    def save_is_due(self) -> bool:
        due = is_due(self.state.step, self.save_every, self.total_steps) or self.agreement.save_due
        return due or (self.config.keep_best > 0 and self.state.is_best)

    def save(self) -> None:
        """Collective: every rank must call this."""
        self._pause()
        self.state.train_s = self._pace.total_s
        self.state.total_s = time.perf_counter() - self._before
        self.enter("SAVING")
        self.checkpoints.save(self.state, self.step)
        self.agreement.saved()
        self.enter("TRAINING")
        self._go_on()

    def finish(self) -> State:
        """The last checkpoint is on the disk; a run that came to its end is measured and gets its result.json.

        Collective: every rank must call this.
        """
        self.enter("SAVING")
        watchdog.expect_nothing()  # of the write under way; an evaluation after it is watched again
        self.checkpoints.finish()
        final = None if self.agreement.stop else self._final_passes()
        if final is None:  # stopped, maybe in the middle of the last evaluations: done again after the resume
            end = self.agreement.stop or "INTERRUPT"
            self.world.on_rank_zero(lambda: self.enter(end))
            watchdog.expect_nothing()
            self.tracker.finish({})
            _log.info(
                "saved and stopped at step %d of %d, state %s. To go on: the same command with --run-name=%s",
                self.state.step, self.total_steps, end, self.run_dir.path.name,
            )  # fmt: skip
            return end
        results = self._results(final)
        self.world.on_rank_zero(lambda: self.run_dir.write_result(results))
        self.world.on_rank_zero(lambda: self.enter("FINISHED"))
        watchdog.expect_nothing()  # what is left may take its time, and takes nothing away
        draws = self.world.is_rank_zero and self.config.tracking.pictures
        self.tracker.finish(results, draw(final, self.run_dir) if draws else {})
        return "FINISHED"

    def _final_passes(self) -> FinalPasses | None:
        """Collective: every rank must call this."""
        self.enter("EVALUATING")
        return final_passes(
            self.splits,
            lambda examples, confusion: self.evaluate_split(self.batches_of(examples), confusion),
            self.world,
            with_train=self.config.final_train_eval,
        )

    def _results(self, final: FinalPasses) -> dict[str, Any]:
        """What result.json says."""
        state, world = self.state, self.world
        samples = state.step * self.config.global_batch_size
        seconds = self.run_dir.time_sheet.totals()  # wall seconds over all attempts, and between them
        if world.is_rank_zero:
            _log.debug("seconds by use: %s", ", ".join(f"{use} {spent:.1f}" for use, spent in seconds.items()))
        return {
            "state": "FINISHED",
            "step": state.step,
            "epoch": state.step / self.steps_per_epoch,
            "attempt": self.run_dir.attempt,
            "world_size": world.size,
            "global_batch_size": self.config.global_batch_size,
            "mixed_precision": world.mixed_precision,
            "early_stopped": self.early_stopped,
            "val_source": self.splits.val_source,
            "step_mode": self.step.mode,
            "warm_up_s": round(self.step.warm_up_s, 3),  # of this attempt, compiling included
            "train_s": round(state.train_s, 3),
            "samples_per_s": round(samples / state.train_s, 1) if state.train_s else None,
            "total_s": round(time.perf_counter() - self._before, 3),
            "seconds": seconds,
            "effective_training_time": round(effective_ratio(seconds), 4),
            **{name: value for name, value in state.val.items() if name != "step"},
            **final.metrics,
            **{f"best/{name.removeprefix('val/')}": value for name, value in state.best.items()},
        }

    def enter(self, state: State) -> None:
        self.set_status(state=state)

    def set_status(self, **fields: Any) -> None:
        if self.world.is_rank_zero:
            epoch = self.state.step / self.steps_per_epoch
            self.run_dir.set_status(
                step=self.state.step, total_steps=self.total_steps, epoch=epoch,
                data_wait_s=round(self.step.data_wait_s, 3), best=self.state.best, **fields,
            )  # fmt: skip

    def _line(self) -> dict[str, Any]:
        step = self.state.step
        return {
            "step": step,
            "epoch": step / self.steps_per_epoch,
            "samples": step * self.config.global_batch_size,
            "attempt": self.run_dir.attempt,
            "time": round(time.time(), 3),
        }

    # --- the pace: train_s counts what happens between _go_on and _pause ----------------------------------------------

    def _pause(self) -> None:
        self.world.synchronize()
        self._pace.stop()

    def _go_on(self) -> None:
        self.agreement.start_phase()
        self._pace.start()

    def _lap(self) -> None:
        self._pace.start()
        self._pace.lap(self.state.step, self.step.data_wait_s)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # strict JSON has no NaN; an fp16 overflow makes one


def _metrics_of(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if "/" in name}
