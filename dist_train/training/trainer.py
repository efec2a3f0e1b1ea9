"""The loop: while there are steps left and nobody told us to stop: take the step; sometimes log, evaluate, save."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass

from dist_train.checkpoints.manager import Checkpoints
from dist_train.checkpoints.train_state import TrainState
from dist_train.config.durations import is_due
from dist_train.config.schema import Config
from dist_train.data.epoch_audit import ShardAudit
from dist_train.data.evaluation_batches import EvaluationBatches, evaluation_batches
from dist_train.data.sets.image_set import Examples
from dist_train.data.splits import Splits
from dist_train.distributed import watchdog
from dist_train.distributed.world import World
from dist_train.errors import TrainingDiverged
from dist_train.models.tasks.confusion import Confusion
from dist_train.runs.records import State
from dist_train.training.agreement import Agreement
from dist_train.training.evaluate import evaluate
from dist_train.training.final_evaluation import FinalEvaluation, final_evaluation
from dist_train.training.recorder import RunRecorder
from dist_train.training.step.counts import Overflows
from dist_train.training.step.lr_schedule import LearningRate
from dist_train.training.step.train_step import Step
from dist_train.training.step_timer import StepTimer

_HOPELESS = 50  # updates in a row that fp16 left out; each has halved the scale

_log = logging.getLogger(__name__)


@dataclass
class Trainer:
    """Everything that takes part in one attempt of a run."""

    config: Config
    world: World
    splits: Splits
    step: Step
    state: TrainState
    checkpoints: Checkpoints
    recorder: RunRecorder
    agreement: Agreement
    learning_rate: LearningRate
    audit: ShardAudit
    steps_per_epoch: int

    def __post_init__(self) -> None:
        self.total_steps = self.learning_rate.total_steps
        every = (self.config.log_every, self.config.eval_every, self.config.save_every)
        self.log_every, self.eval_every, self.save_every = (
            0 if duration.unit == "s" else duration.to_steps(self.steps_per_epoch) for duration in every
        )
        self.val = self.batches_of(self.splits.val) if self.splits.val is not None else None
        self._timer = StepTimer(self.state.train_s)
        self._timer.start_window(self.state.step, self.step.data_wait_s)

    def __enter__(self) -> Trainer:
        self.recorder.screen.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.recorder.screen.__exit__(*error)
        self.checkpoints.close()

    @property
    def early_stopped(self) -> bool:
        stopping = self.config.early_stop
        return stopping is not None and self.state.evaluations_without_gain >= stopping.patience

    def train(self) -> State:
        """To the end of the schedule, or to an agreed stop; the last state is saved either way.

        Collective: every rank must call this.
        """
        state, step, agreement = self.state, self.step, self.agreement
        if state.evaluation_pending:
            self.evaluate()
            if state.is_best:
                self.save()
        self.recorder.set_state("TRAINING")
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
        state, step = self.state, self.step
        totals = step.pop_window()
        if not math.isfinite(totals["loss"]):
            raise TrainingDiverged(
                f"The loss is not finite between step {state.logged_step + 1} and {state.step}. The last good "
                f"checkpoint is {self.checkpoints.describe_last()}. Lower optimizer.lr or set max_grad_norm."
            )
        if step.eager.overflows is not None:
            totals["overflows"] = self._count_overflows(step.eager.overflows)
        pace = self._timer.measure(state.step, step.data_wait_s, self.config.global_batch_size)
        state.logged_step = state.step
        self._lap()
        self.recorder.log_train(totals, self.learning_rate.at(state.step - 1), pace)

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
        found = self.audit.close_epoch(self.state.step)
        self.recorder.log_epoch_audit(found)
        epoch = math.ceil(self.state.step / self.steps_per_epoch)
        _log.debug(
            "epoch %d: %d examples, none twice, %d dropped", epoch, found["audit/unique"], found["audit/dropped"]
        )

    def evaluate(self) -> None:
        """One `val` line, and those of an early stop; a stop agreed meanwhile leaves it to the resumed run.

        Collective: every rank must call this.
        """
        if self.val is None:
            return
        self._pause()
        self.state.evaluation_pending = True
        if not self.agreement.stop:
            self.recorder.set_state("EVALUATING")
            started = time.perf_counter()
            found = self.evaluate_split(self.val)
            if found is not None:
                seconds = time.perf_counter() - started
                self._record_evaluation({f"val/{name}": value for name, value in found.items()}, seconds)
            self.recorder.set_state("EVALUATED")
        self._go_on()
        if self.early_stopped:
            self._close_early()

    def _close_early(self) -> None:
        """The lines of the end that came early, unless they were due here anyway.

        Before the save, in which they are no longer due: they are written once, whatever kills the run in between.
        """
        if not is_due(self.state.step, self.log_every, self.total_steps):
            self.log()
        if not is_due(self.state.step, self.steps_per_epoch, self.total_steps):
            self.close_epoch()

    def _record_evaluation(self, metrics: dict[str, float], seconds: float) -> None:
        stopping = self.config.early_stop
        self.state.record_evaluation(metrics, stopping.min_delta if stopping else 0.0)
        self.recorder.log_eval(seconds)
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
        self.state.train_s = self._timer.total_s
        self.state.total_s = self.recorder.total_s
        self.state.audit = self.audit.totals()
        self.recorder.set_state("SAVING")
        self.checkpoints.save(self.state, self.step)
        self.agreement.saved()
        self.recorder.set_state("TRAINING")
        self._go_on()

    def finish(self) -> State:
        """The last checkpoint is on the disk; a run that came to its end is measured and gets its result.json.

        Collective: every rank must call this.
        """
        self.recorder.set_state("SAVING")
        watchdog.disarm()  # of the write under way; an evaluation after it is watched again
        self.checkpoints.finish()
        final = None if self.agreement.stop else self._final_passes()
        if final is None:  # stopped, maybe in the middle of the last evaluations: done again after the resume
            end = self.agreement.stop or "INTERRUPT"
            self.recorder.stop(end)
            return end
        self.recorder.finish(final, early_stopped=self.early_stopped, val_source=self.splits.val_source)
        return "FINISHED"

    def _final_passes(self) -> FinalEvaluation | None:
        """Collective: every rank must call this."""
        self.recorder.set_state("EVALUATING")
        return final_evaluation(
            self.splits,
            lambda examples, confusion: self.evaluate_split(self.batches_of(examples), confusion),
            self.world,
            with_train=self.config.final_train_eval,
        )

    # --- the pace: train_s counts what happens between _go_on and _pause ----------------------------------------------

    def _pause(self) -> None:
        self.world.synchronize()
        self._timer.stop()

    def _go_on(self) -> None:
        self.agreement.start_phase()
        self._timer.start()

    def _lap(self) -> None:
        self._timer.start()
        self._timer.start_window(self.state.step, self.step.data_wait_s)
