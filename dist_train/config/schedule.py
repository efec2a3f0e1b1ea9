"""The settings of the learning rate schedule."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from dist_train.config.durations import Duration
from dist_train.config.section import Section
from dist_train.config.values import Fraction, PositiveSteps, Steps, known_or_own

# The settings of each schedule besides warmup and final_ratio, which are ignored where they have no meaning.
SCHEDULES: dict[str, frozenset[str]] = {
    "constant": frozenset(),
    "cosine": frozenset(),
    "linear": frozenset(),
    "one_cycle": frozenset(),
    "step": frozenset({"step_size", "milestones", "gamma"}),
    "polynomial": frozenset({"power"}),
    "cosine_restarts": frozenset({"t_0", "t_mult"}),
}


def _schedule_or_own(name: str) -> str:
    return known_or_own("schedule", name, SCHEDULES, "package.module:function")


class ScheduleConfig(Section):
    # How lr changes after the warm-up: constant, cosine, linear, one_cycle, step, polynomial, cosine_restarts, or your
    # own function as package.module:function, which returns lr / peak for (step, total), step from 0 to total - 1.
    name: Annotated[str, AfterValidator(_schedule_or_own)] = "constant"
    # Linear rise from 0 to the peak. For one_cycle the length of its rise; there 0 means 30 % of the run.
    warmup: Steps = Duration(0)
    # For cosine, linear, polynomial and cosine_restarts: final learning rate / peak learning rate.
    final_ratio: Fraction = 0.0
    step_size: PositiveSteps | None = None  # for step: multiply lr by gamma each time that this much is trained
    milestones: list[PositiveSteps] | None = None  # for step: multiply lr by gamma here, instead of with step_size
    gamma: Annotated[float, Field(gt=0, lt=1)] | None = None  # for step; None: 0.1
    power: PositiveFloat | None = None  # for polynomial; None: 1, which is linear
    t_0: PositiveSteps | None = None  # for cosine_restarts: length of the first cycle, after the warm-up
    t_mult: PositiveInt | None = None  # for cosine_restarts: length of a cycle / length of the one before; None: 1

    @model_validator(mode="after")
    def _fits(self) -> ScheduleConfig:
        own = SCHEDULES.get(self.name, frozenset())
        unknown = sorted(key for key in set().union(*SCHEDULES.values()) - own if getattr(self, key) is not None)
        if unknown:
            raise ValueError(
                f"{self.name} has no {', '.join(unknown)}. Its settings: {', '.join(sorted(own)) or 'none'}"
            )
        if self.name == "step" and (self.step_size is None) == (not self.milestones):
            raise ValueError("step takes step_size, such as 30 epochs, or milestones, such as [30 epochs, 60 epochs]")
        if self.name == "cosine_restarts" and self.t_0 is None:
            raise ValueError("cosine_restarts needs t_0, the length of the first cycle, such as 10 epochs")
        if ":" in self.name and (self.warmup.value or self.final_ratio):
            raise ValueError(f"{self.name} returns lr / peak at every step: leave out warmup and final_ratio")
        return self
