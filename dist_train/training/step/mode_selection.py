"""A faster form of the update, tried beside the eager one on real batches before it is trusted with the run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_train.config.schema import StepMode

Update = Callable[[int], None]  # one optimizer update, that many having gone before

_COMPARED = 3  # steps, each from where the eager updates had come to
# What two right forms of a step may be apart, as a part of the step; the median of the steps counts. In fp32 they were
# 3e-5 apart, and 4e-3 where BatchNorm and max-pooling carry rounding far (docs/step_mode.md): a fault of 1 % is found.
# Where rounding alone carries further, as in bf16 or where the true gradient is zero, it is twice as far.
MAX_DISTANCE = 8e-3
_ROUNDINGS = 2
_ROWS, _ROW_S = 5, 0.05  # then rows of steps are timed, of about so many seconds


# The mode to try on a device, and the seconds that trying it may take (cpu: 8 to 18 measured; cuda: not measured).
_TRIALS: dict[str, tuple[StepMode, float]] = {"cpu": ("compile", 20.0), "cuda": ("graph", 2.0)}


def mode_to_try(device: str, steps_left: int, pass_s: float) -> StepMode:
    """The mode that would repay itself in the rest of the run, by the time of one forward and backward.

    A gain is not sure before it was tried: if it comes to nothing, that must not cost more than a tenth of the rest.
    """
    mode, trial_s = _TRIALS.get(device, ("eager", 0.0))
    return mode if steps_left * pass_s > 10 * trial_s else "eager"


@dataclass(frozen=True)
class TrialResult:
    """What was found."""

    preparation_s: float  # compiling or capturing
    eager_s: float  # median of one update
    fast_s: float
    distance: float  # between the two outcomes, as a part of the eager step; of the tensor that is worst
    allowed: float  # for that tensor

    def rejection_reason(self, must_gain: bool) -> str:
        """Why the fast update is not to be used, or nothing."""
        if not self.distance <= self.allowed:
            return f"its steps are {self.distance:.2%} off the eager ones, where rounding explains {self.allowed:.2%}"
        return f"it has no gain, {self}" if must_gain and self.fast_s >= self.eager_s else ""

    def __str__(self) -> str:
        times = f"{1000 * self.fast_s:.3f} ms a step against {1000 * self.eager_s:.3f} ms eager"
        return f"{times}, {self.preparation_s:.1f} s to prepare"


def try_update(
    eager: Update,
    perturbed: Update,
    prepare: Callable[[], Update],
    state: list[Tensor],
    step: int,
    synchronize: Callable[[], None],
) -> tuple[Update, TrialResult]:
    """The fast update that `prepare` makes, and how it did. `state`, all that an update changes, is as before after it.

    `perturbed`: the eager update on inputs that are off by rounding.

    Raises: whatever compiling, capturing or running the net so raises.
    """
    with unchanged(state) as before:
        marks, rounding = [before], []
        for number in range(_COMPARED):
            eager(step + number)
            marks.append([tensor.detach().clone() for tensor in state])
            _put(state, marks[number])
            perturbed(step + number)
            rounding.append(_distances(marks[number], marks[number + 1], state))
            _put(state, marks[number + 1])
        eager_s = median_time(eager, step, synchronize)
    with unchanged(state):
        started = time.perf_counter()
        fast = prepare()
        synchronize()
        preparation_s = time.perf_counter() - started
    with unchanged(state):
        found = []
        for number in range(_COMPARED):
            _put(state, marks[number])
            fast(step + number)
            found.append(_distances(marks[number], marks[number + 1], state))
        fast_s = median_time(fast, step, synchronize)
    distances = map(statistics.median, zip(*found, strict=True))
    allowed = (max(MAX_DISTANCE, _ROUNDINGS * max(each)) for each in zip(*rounding, strict=True))
    worst = max(zip(distances, allowed, strict=True), key=lambda pair: pair[0] / pair[1])
    return fast, TrialResult(preparation_s, eager_s, fast_s, *worst)


@contextmanager
def unchanged(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Whatever is done in here, each holds afterwards what it holds now. Yields copies of that."""
    tensors = list(tensors)
    values = [tensor.detach().clone() for tensor in tensors]
    try:
        yield values
    finally:
        _put(tensors, values)


def median_time(update: Update, step: int, synchronize: Callable[[], None]) -> float:
    """Seconds of one update in a row of them, the device waited for only at the row's end, as between two logs."""
    one = _time_of_row(update, step, 1, synchronize)
    length = max(1, min(20, round(_ROW_S / one)))
    return statistics.median(_time_of_row(update, step, length, synchronize) for _ in range(_ROWS))


def _time_of_row(update: Update, step: int, length: int, synchronize: Callable[[], None]) -> float:
    synchronize()
    started = time.perf_counter()
    for number in range(length):
        update(step + number)
    synchronize()
    return (time.perf_counter() - started) / length


@torch.no_grad()
def _put(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


@torch.no_grad()
def _distances(before: list[Tensor], wanted: list[Tensor], found: list[Tensor]) -> list[float]:
    """Of each tensor: |found - wanted| / |wanted - before|, L2 norms. Not finite counts as infinite."""
    distances = []
    for start, aim, end in zip(before, wanted, found, strict=True):
        way = (aim.double() - start.double()).norm()
        off = (end.double() - aim.double()).norm()
        moved = off != 0 or not off.isfinite()
        distances.append(float(torch.nan_to_num(off / way, nan=torch.inf, posinf=torch.inf)) if moved else 0.0)
    return distances
