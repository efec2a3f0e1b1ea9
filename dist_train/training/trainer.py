"""The training loop: take steps until the end or a stop; log, evaluate and save when due."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass

from dist_train.checkpoints.contents import TrainerState
from dist_train.checkpoints.manager import Checkpoints
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
from dist_train.models.tasks.split_metrics import split_metrics
from dist_train.runs.records import State
from dist_train.training.agreement import Agreement
from dist_train.training.evaluate import evaluate
from dist_train.training.final_evaluation import FinalEvaluation, final_evaluation
from dist_train.training.recorder import RunRecorder
from dist_train.training.start_report import report_dependence
from dist_train.training.step.counts import Overflows
from dist_train.training.step.lr_schedule import LearningRate
from dist_train.training.step.train_step import Step
from dist_train.training.step_timer import StepTimer
from dist_train.training.step_trace import StepTrace

_NOTICEABLE_WAIT = 0.2  # of the time in steps
_MAX_OVERFLOWS = 50  # consecutive updates skipped by fp16; each has halved the scale

_log = logging.getLogger(__name__)


@dataclass
class Trainer:
    """The training loop of one attempt, with everything it uses."""

    config: Config
    world: World
    splits: Splits
    step: Step
    state: TrainerState
    checkpoints: Checkpoints
    recorder: RunRecorder
    agreement: Agreement
    learning_rate: LearningRate
    audit: ShardAudit
    steps_per_epoch: int
    trace: StepTrace | None

    def __post_init__(self) -> None:
        self.total_steps = self.learning_rate.total_steps
        every = (self.config.log_every, self.config.eval_every, self.config.save_every)
        self.log_every, self.eval_every, self.save_every = (
            0 if duration.unit == "s" else duration.to_steps(self.steps_per_epoch) for duration in every
        )
        self.val = self.batches_of(self.splits.val) if self.splits.val is not None else None
        self._timer = StepTimer(self.state.train_s)
        self._timer.start_window(self.state.step, self.step.data_wait_s)
        self._began = self._timer.now_s(), self.step.data_wait_s
        self._first_epoch = self.state.step // self.steps_per_epoch + 1

    def __enter__(self) -> Trainer:
        self.recorder.screen.__enter__()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self.recorder.screen.__exit__()
        self.checkpoints.close()
        if error is not None and self.world.size == 1:  # otherwise other ranks wait for this one to end
            self.recorder.tracker.abandon()

    @property
    def early_stopped(self) -> bool:
        stopping = self.config.early_stop
        return stopping is not None and self.state.evaluations_without_gain >= stopping.patience

    def train(self) -> State:
        """Train until the end of the schedule, an early stop or an agreed stop, and save the last state.

        Collective: every rank must call this.
        """
        state, step, agreement = self.state, self.step, self.agreement
        if state.evaluation_pending:
            self.evaluate()
            if state.is_best:
                self.save()
        self.recorder.set_state("TRAINING")
        self._start_window()
        while state.step < self.total_steps and not agreement.stop and not self.early_stopped:
            if state.step == step.unfreezes_at:
                self.unfreeze()
            if self.trace is not None and self.trace.turns_at(state.step):
                self._pause_timer()
                self._resume_timer()
            step.take(state.step)
            state.step += 1
            agreement.tick()

            # The host waits for the device only below.
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
        self._pause_timer()
        return self.finish()

    def unfreeze(self) -> None:
        """Train all of the net from here on, after a warm-up as at a start.

        Collective: every rank must call this.
        """
        self._pause_timer()
        watchdog.arm(max(self.config.setup_timeout_s, self.config.stall_timeout_s))  # it may compile
        known = self.step.effects.world_size_dependent
        self.step.warm_up(self.state.step, self.step.chosen_mode)
        _log.info("from step %d on all of the net is trained", self.state.step + 1)
        report_dependence(each for each in self.step.effects.world_size_dependent if each not in known)
        self._resume_timer()

    def log(self) -> None:
        """Write one `train` line over the window since the last one.

        Collective: every rank must call this.

        Raises:
            TrainingDiverged: on every rank, if the window's loss is not finite.
        """
        state, step = self.state, self.step
        totals = step.pop_window()
        if not math.isfinite(totals["loss"]):
            raise TrainingDiverged(
                f"The loss is not finite between step {state.logged_step + 1} and {state.step}. "
                f"{self.checkpoints.describe_last()} Lower optimizer.lr or set max_grad_norm."
            )
        if step.eager.overflows is not None:
            totals["overflows"] = self._count_overflows(step.eager.overflows)
        perf = self._timer.measure(state.step, step.data_wait_s, self.config.global_batch_size)
        state.logged_step = state.step
        self._start_window()
        self.recorder.log_train(totals, self.learning_rate.at(state.step - 1), perf)

    def _count_overflows(self, overflows: Overflows) -> int:
        count, in_a_row = overflows.pop()
        if in_a_row >= _MAX_OVERFLOWS:
            raise TrainingDiverged(
                f"Between step {self.state.logged_step + 1} and {self.state.step} fp16 skipped {in_a_row} updates in "
                f"a row: their gradients were not finite at any scale. "
                f"{self.checkpoints.describe_last()} Lower optimizer.lr, set max_grad_norm, or use "
                f"mixed_precision=bf16."
            )
        return count

    def close_epoch(self) -> None:
        """Write one `audit` line: what was trained on in this epoch, which may be cut short by the end of the run.

        Collective: every rank must call this.

        Raises:
            DistTrainError: on every rank, if these are not the examples of the epoch's order.
        """
        counts = self.audit.close_epoch(self.state.step)
        self.recorder.log_epoch_audit(counts)
        epoch = math.ceil(self.state.step / self.steps_per_epoch)
        _log.debug(
            "epoch %d: %d different examples, %d draws of one again, %d not seen",
            epoch, counts["audit/unique"], counts["audit/duplicate"], counts["audit/dropped"],
        )  # fmt: skip
        if epoch == self._first_epoch and self.world.is_rank_zero:
            self._suggest_resident()

    def _suggest_resident(self) -> None:
        """Log how to save the time that the attempt's first epoch waited for a data set, if it fits in memory."""
        needed, (since_s, since_wait_s) = self.splits.resident_bytes, self._began
        share = (self.step.data_wait_s - since_wait_s) / (self._timer.now_s() - since_s)
        # Keeping the set takes two passes over it.
        if needed is not None and share > _NOTICEABLE_WAIT and self.total_steps > 3 * self.steps_per_epoch:
            _log.info(
                "%.0f %% of the time in steps went into waiting for examples. data.resident=true would make each of "
                "them twice at the start of a run and then keep them, in %.1f MB of memory per process.",
                100 * share, needed / 1e6,
            )  # fmt: skip

    def evaluate(self) -> None:
        """Write one `val` line, and the final lines on an early stop. After an agreed stop the resumed run does it.

        Collective: every rank must call this.
        """
        if self.val is None:
            return
        self._pause_timer()
        self.state.evaluation_pending = True
        if not self.agreement.stop:
            self.recorder.set_state("EVALUATING")
            started = time.perf_counter()
            metrics = self.evaluate_split(self.val)
            if metrics is not None:
                seconds = time.perf_counter() - started
                self._record_evaluation({f"val/{name}": value for name, value in metrics.items()}, seconds)
            self.recorder.set_state("EVALUATED")
        self._resume_timer()
        if self.early_stopped:
            self._close_early()

    def _close_early(self) -> None:
        """Write the final `train` and `audit` lines of an early stop, unless they were due at this step anyway.

        Called before the save, after which they are no longer due: each is written once, wherever a kill hits the run.
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
            _log.info("early stop: no improvement in %d evaluations", self.state.evaluations_without_gain)

    def evaluate_split(self, batches: EvaluationBatches, confusion: Confusion | None = None) -> dict[str, float] | None:
        """Return the metrics of the current weights on `batches`, None after an agreed stop.

        Collective: every rank must call this.
        """
        self.agreement.start_phase()
        net, objective = self.step.evaluated_net, self.step.evaluation_objective
        metrics = split_metrics(self.config, batches.num_examples, self.world.device)
        return evaluate(net, batches, objective, self.world, self.agreement, confusion, metrics)

    def batches_of(self, examples: Examples) -> EvaluationBatches:
        return evaluation_batches(examples, self.step.net, self.world, self.config)

    def save_is_due(self) -> bool:
        due = is_due(self.state.step, self.save_every, self.total_steps) or self.agreement.save_due
        return due or (self.config.keep_best > 0 and self.state.is_best)

    def save(self) -> None:
        """Save a checkpoint.

        Collective: every rank must call this.
        """
        self._pause_timer()
        self.state.train_s = self._timer.total_s
        self.state.total_s = self.recorder.total_s
        self.state.audit = self.audit.totals()
        self.recorder.record_brief_state("SAVING")
        self.checkpoints.save(self.state, self.step)
        self.agreement.saved()
        self.recorder.record_brief_state("TRAINING")
        self._resume_timer()

    def finish(self) -> State:
        """Wait for the last checkpoint. Unless the run was stopped, evaluate it and write result.json.

        Collective: every rank must call this.
        """
        self.recorder.set_state("SAVING")
        watchdog.disarm()  # during the pending write; the evaluation after it arms the watchdog again
        self.checkpoints.finish()
        final = None if self.agreement.stop else self._evaluate_final()
        if final is None:  # stopped, maybe during the final evaluation, which the resumed run repeats
            end = self.agreement.stop or "INTERRUPT"
            self.recorder.stop(end)
            return end
        self.recorder.finish(final, early_stopped=self.early_stopped, val_source=self.splits.val_source)
        return "FINISHED"

    def _evaluate_final(self) -> FinalEvaluation | None:
        """Collective: every rank must call this."""
        self.recorder.begin_final_evaluation()
        return final_evaluation(
            self.splits,
            lambda examples, confusion: self.evaluate_split(self.batches_of(examples), confusion),
            self.world,
            with_train=self.config.final_train_eval,
        )

    # --- timing: train_s counts the time between _resume_timer and _pause_timer, and nothing else is traced -----------

    def _pause_timer(self) -> None:
        self.world.synchronize()
        self._timer.stop()
        if self.trace is not None:
            self.trace.end(self.state.step)

    def _resume_timer(self) -> None:
        if self.trace is not None:
            self.trace.begin(self.state.step)
        self.agreement.start_phase()
        self._timer.start()

    def _start_window(self) -> None:
        self._timer.start()
        self._timer.start_window(self.state.step, self.step.data_wait_s)
