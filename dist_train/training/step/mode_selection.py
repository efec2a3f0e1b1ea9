"""Selection of a faster update mode, after a trial against the eager update on real batches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_train.config.schema import StepMode

Update = Callable[[int], None]  # does the optimizer update with this number (from 0)

_COMPARED_STEPS = 3  # each from the state that the eager updates had reached
# The largest difference between two correct forms of a step, relative to the step; the median over the steps counts.
# Measured in fp32: 3e-5, and 4e-3 where BatchNorm and max-pooling amplify rounding (docs/step_mode.md), so a fault of
# 1 % is found. Where rounding alone has a larger effect, as in bf16 or with a true gradient of zero, the limit is twice
# that effect.
MAX_DISTANCE = 8e-3
_ROUNDING_FACTOR = 2
_REPEATS, _REPEAT_S = 5, 0.05  # timed sequences of steps, and about how long each one takes


# The modes to try on a device, the fastest first, and the seconds that a trial may take (measured: compile 8 to 18 on a
# CPU and 20 to 40 on an H100, graph 1).
_TRIALS: dict[str, dict[StepMode, float]] = {"cpu": {"compile": 20.0}, "cuda": {"compile": 40.0, "graph": 2.0}}


def modes_to_try(device: str, steps_left: int, pass_s: float) -> list[StepMode]:
    """Return the modes whose trial can pay off in the rest of the run. `pass_s`: of one forward and backward.

    The gain is unknown before the trial: a trial without gain must not cost more than a tenth of the remaining time.
    """
    return [mode for mode, trial_s in _TRIALS.get(device, {}).items() if steps_left * pass_s > 10 * trial_s]


@dataclass(frozen=True)
class TrialResult:
    """The result of a trial."""

    preparation_s: float  # compiling or capturing
    eager_s: float  # median of one update
    fast_s: float
    distance: float  # between the two results, relative to the eager step, for the worst tensor
    allowed: float  # for that tensor

    def rejection_reason(self, must_be_faster: bool) -> str:
        """Return why the fast update must not be used, "" if it may."""
        if not self.distance <= self.allowed:
            return f"its steps differ from the eager ones by {self.distance:.2%}; rounding explains {self.allowed:.2%}"
        return f"not faster: {self}" if must_be_faster and self.fast_s >= self.eager_s else ""

    def __str__(self) -> str:
        times = f"{1000 * self.fast_s:.3f} ms per step, eager {1000 * self.eager_s:.3f} ms"
        return f"{times}, {self.preparation_s:.1f} s to prepare"


def try_update(
    eager: Update,
    perturbed: Update,
    prepare: Callable[[], Update],
    state: list[Tensor],
    step: int,
    synchronize: Callable[[], None],
    slowest: Callable[[float], float] = float,
) -> tuple[Update, TrialResult]:
    """Return the fast update that `prepare` makes and its trial result. Restores `state`, all that an update changes.

    `perturbed`: the eager update on inputs with rounding errors added. `slowest`: returns the longest time of all
    ranks, which must take as many steps.

    Raises: any error of compiling, capturing or running the net in this mode.
    """
    with unchanged(state) as before:
        marks, rounding = [before], []
        for number in range(_COMPARED_STEPS):
            eager(step + number)
            marks.append([tensor.detach().clone() for tensor in state])
            _set_values(state, marks[number])
            perturbed(step + number)
            rounding.append(_distances(marks[number], marks[number + 1], state))
            _set_values(state, marks[number + 1])
        eager_s = median_time(eager, step, synchronize, slowest)
    with unchanged(state):
        started = time.perf_counter()
        fast = prepare()
        synchronize()
        preparation_s = time.perf_counter() - started
    with unchanged(state):
        fast_distances = []
        for number in range(_COMPARED_STEPS):
            _set_values(state, marks[number])
            fast(step + number)
            fast_distances.append(_distances(marks[number], marks[number + 1], state))
        fast_s = median_time(fast, step, synchronize, slowest)
    distances = map(statistics.median, zip(*fast_distances, strict=True))
    allowed = (max(MAX_DISTANCE, _ROUNDING_FACTOR * max(each)) for each in zip(*rounding, strict=True))
    worst = max(zip(distances, allowed, strict=True), key=lambda pair: pair[0] / pair[1])
    return fast, TrialResult(preparation_s, eager_s, fast_s, *worst)


@contextmanager
def unchanged(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Restore the values of `tensors` at the end. Yields copies of the values."""
    tensors = list(tensors)
    values = [tensor.detach().clone() for tensor in tensors]
    try:
        yield values
    finally:
        _set_values(tensors, values)


def median_time(
    update: Update, step: int, synchronize: Callable[[], None], slowest: Callable[[float], float] = float
) -> float:
    """Return the median seconds per update. Waits for the device once per sequence of updates, as between two logs."""
    one = slowest(_time_per_update(update, step, 1, synchronize))
    length = max(1, min(20, round(_REPEAT_S / one)))
    return statistics.median(_time_per_update(update, step, length, synchronize) for _ in range(_REPEATS))


def _time_per_update(update: Update, step: int, length: int, synchronize: Callable[[], None]) -> float:
    synchronize()
    started = time.perf_counter()
    for number in range(length):
        update(step + number)
    synchronize()
    return (time.perf_counter() - started) / length


@torch.no_grad()
def _set_values(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


@torch.no_grad()
def _distances(before: list[Tensor], expected: list[Tensor], actual: list[Tensor]) -> list[float]:
    """Return |actual - expected| / |expected - before| of each tensor. Not finite counts as infinite."""
    distances = []
    for start, target, end in zip(before, expected, actual, strict=True):
        step, error = _difference(target, start), _difference(end, target)
        differs = error != 0 or not error.isfinite()
        distances.append(float(torch.nan_to_num(error / step, nan=torch.inf, posinf=torch.inf)) if differs else 0.0)
    return distances


def _difference(one: Tensor, other: Tensor) -> Tensor:
    """Return the L2 norm of the difference, []. A mask may hold infinities; equal ones have no difference."""
    difference: Tensor = (one.double() - other.double()).masked_fill_(one == other, 0.0).norm()
    return difference
