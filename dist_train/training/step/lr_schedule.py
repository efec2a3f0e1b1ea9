"""The learning rate as a function of the step. Its names are `SCHEDULES` in config/schedule.py."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from dist_train.config.schema import Config
from dist_train.errors import UserCodeError
from dist_train.user_code.importing import load_object, wrap_user_errors


@dataclass(frozen=True)
class LearningRate:
    """The learning rate as a pure function of the step: nothing to save, nothing to replay on resume."""

    peak: float
    total_steps: int
    name: str = "constant"
    warmup_steps: int = 0
    final_ratio: float = 0.0  # relative to the peak, reached at the last step, or at the last of each cycle
    step_size: int = 0  # of `step`; 0: milestones
    milestones: tuple[int, ...] = ()  # of `step`, sorted
    gamma: float = 0.1  # of `step`
    power: float = 1.0  # of `polynomial`
    t_0: int = 1  # of `cosine_restarts`
    t_mult: int = 1  # of `cosine_restarts`
    function: Callable[[int, int], float] | None = None  # of the user, (step, total_steps) -> lr / peak

    @classmethod
    def of(cls, config: Config, steps_per_epoch: int) -> LearningRate:
        """Return the learning rate of a run.

        Raises:
            ConfigError, UserCodeError: the user's function is missing, or fails at the first or at the last step.
        """
        schedule = config.schedule
        found = cls(
            peak=config.optimizer.scaled_lr(config.global_batch_size),
            total_steps=config.train_for.to_steps(steps_per_epoch),
            name=schedule.name,
            warmup_steps=schedule.warmup.to_steps(steps_per_epoch),
            final_ratio=schedule.final_ratio,
            step_size=schedule.step_size.to_steps(steps_per_epoch) if schedule.step_size else 0,
            milestones=tuple(sorted(each.to_steps(steps_per_epoch) for each in schedule.milestones or ())),
            gamma=schedule.gamma or cls.gamma,
            power=schedule.power or cls.power,
            t_0=schedule.t_0.to_steps(steps_per_epoch) if schedule.t_0 else cls.t_0,
            t_mult=schedule.t_mult or cls.t_mult,
            function=load_object(schedule.name) if ":" in schedule.name else None,
        )
        for step in (0, found.total_steps - 1):
            found.at(step)
        return found

    def at(self, step: int) -> float:
        """Return the learning rate of update number `step` (from 0).

        `one_cycle` is that of torch.optim.lr_scheduler.OneCycleLR (two cosines; starts at peak / 25, ends at
        peak / 250 000). It rises for `warmup_steps`, or for 30 % of the run. `step` is that of StepLR and MultiStepLR,
        and counts from the start of the run; `cosine_restarts` is that of CosineAnnealingWarmRestarts.

        Raises:
            UserCodeError: the user's function fails, or does not return a number >= 0.
        """
        if self.function is not None:
            return self.peak * self._of_user(self.function, step)
        if self.name == "one_cycle":
            return self._one_cycle(step)
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.name == "constant":
            return self.peak
        if self.name == "step":
            falls = step // self.step_size if self.step_size else bisect_right(self.milestones, step)
            return self.peak * self.gamma**falls
        if self.name == "cosine_restarts":
            done = self._done_in_cycle(step - self.warmup_steps)
        else:
            done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        if self.name in ("cosine", "cosine_restarts"):
            fall = 0.5 * (1 + math.cos(math.pi * done))
        elif self.name in ("linear", "polynomial"):
            fall = max(0.0, 1 - done) ** self.power  # 1 for linear
        else:
            raise AssertionError(f"{self.name} is in SCHEDULES, and has no formula here")
        return self.peak * (self.final_ratio + (1 - self.final_ratio) * fall)

    def _one_cycle(self, step: int) -> float:
        start, end = self.peak / 25, self.peak / 25e4
        top = (self.warmup_steps or 0.3 * self.total_steps) - 1
        if step < top:
            return _cosine(start, self.peak, step / top)
        return _cosine(self.peak, end, (step - top) / max(1.0, self.total_steps - 1 - top))

    def _done_in_cycle(self, step: int) -> float:
        """Return the part of its cycle, from 0 to 1, that lies before this step after the warm-up."""
        length = self.t_0
        if self.t_mult == 1:
            step %= length
        while step >= length:
            step -= length
            length *= self.t_mult
        return step / length

    def _of_user(self, function: Callable[[int, int], float], step: int) -> float:
        step = min(step, self.total_steps - 1)  # the trial of a mode may go past the end
        with wrap_user_errors(f"schedule.name={self.name}", f"fails for ({step}, {self.total_steps})"):
            factor = float(function(step, self.total_steps))
        if not (math.isfinite(factor) and factor >= 0):
            raise UserCodeError(
                f"schedule.name={self.name} returns {factor:g} for ({step}, {self.total_steps}): make it lr / peak, a "
                f"finite number of at least 0."
            )
        return factor


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))
