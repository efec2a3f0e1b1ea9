"""Durations, `is_due`, and the learning rate compared with torch's schedulers."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import SGD, lr_scheduler

from dist_train.config.durations import Duration, is_due
from dist_train.config.schema import ScheduleName
from dist_train.errors import ConfigError
from dist_train.training.step.lr_schedule import LearningRate

UNITS = ["steps", "epochs", "s"]
durations = st.one_of(
    st.integers(0, 2**53).map(lambda value: Duration(float(value))),
    st.builds(Duration, st.floats(0, 1e18, allow_nan=False, allow_subnormal=False), st.sampled_from(["epochs", "s"])),
)


@given(durations)
def test_duration_round_trips_through_text(duration: Duration) -> None:
    """A resumed run reads its own config.yaml: a digit lost in printing would change the length of the run."""
    assert Duration.parse(str(duration)) == duration
    assert "e" not in str(duration).split()[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3 epochs", Duration(3, "epochs")),
        ("1 epoch", Duration(1, "epochs")),
        ("0.5epochs", Duration(0.5, "epochs")),
        (".5 epochs", Duration(0.5, "epochs")),
        ("600 steps", Duration(600, "steps")),
        (" 600 ", Duration(600, "steps")),
        (600, Duration(600, "steps")),
        (600.0, Duration(600, "steps")),
        ("30 s", Duration(30, "s")),
        ("1.5 seconds", Duration(1.5, "s")),
        (Duration(2), Duration(2)),
    ],
)
def test_accepted_spellings(text: object, expected: Duration) -> None:
    assert Duration.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["", "3 weeks", "-1 steps", "epochs", "3 epochs 2", "1e3 steps", None, True, [3], "nan"]
)
def test_error_of_invalid_duration_shows_valid_forms(text: object) -> None:
    with pytest.raises(ValueError, match='"3 epochs", "600 steps" or "30 s"'):
        Duration.parse(text)


def test_fractions_of_step_and_infinite_durations_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"2\.5 steps is not a whole number"):
        Duration.parse("2.5 steps")
    for unit in UNITS:
        with pytest.raises(ValueError, match=unit):
            Duration.parse("9" * 400 + unit)


@given(st.floats(0.001, 1000), st.integers(1, 10**6))
def test_epochs_to_steps(epochs: float, steps_per_epoch: int) -> None:
    steps = Duration(epochs, "epochs").to_steps(steps_per_epoch)
    assert steps >= 1
    assert abs(steps - epochs * steps_per_epoch) <= 0.5 or steps == 1
    assert Duration(0, "epochs").to_steps(steps_per_epoch) == 0
    assert Duration(7).to_steps(steps_per_epoch) == 7


def test_seconds_cannot_be_converted_to_steps() -> None:
    with pytest.raises(ConfigError, match=r'"30 s" cannot be converted to steps\. Write it in steps or epochs'):
        Duration(30, "s").to_steps(10)


@given(st.integers(0, 50), st.integers(1, 100))
def test_due_periodically_and_once_at_end(every: int, total: int) -> None:
    due = [step for step in range(1, total + 1) if is_due(step, every, total)]
    regular = list(range(every, total + 1, every)) if every else []
    assert due == sorted({*regular, total})


def torch_rates(make: type[lr_scheduler.LRScheduler], total: int, peak: float, **kwargs: object) -> list[float]:
    """The learning rates of torch's scheduler at steps 0 to total - 1."""
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    scheduler = make(optimizer, **kwargs)  # type: ignore[arg-type]
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def ours(total: int, name: ScheduleName, peak: float = 0.3, warmup: int = 0, final: float = 0.0) -> list[float]:
    schedule = LearningRate(peak, total, name, warmup, final)
    return [schedule.at(step) for step in range(total)]


@pytest.mark.parametrize("total", [2, 3, 10, 101])
def test_one_cycle_equals_torch(total: int) -> None:
    for kwargs in ({}, {"pct_start": 0.5}) if total == 10 else ({},):
        theirs = torch_rates(lr_scheduler.OneCycleLR, total, 0.3, max_lr=0.3, total_steps=total, **kwargs)
        assert ours(total, "one_cycle", warmup=5 if kwargs else 0) == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("total", [1, 10, 101])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine_and_linear_equal_torch(total: int, final: float) -> None:
    cosine = torch_rates(lr_scheduler.CosineAnnealingLR, total, 0.3, T_max=total, eta_min=0.3 * final)
    linear = torch_rates(lr_scheduler.LinearLR, total, 0.3, start_factor=1.0, end_factor=final, total_iters=total)
    assert ours(total, "cosine", final=final) == pytest.approx(cosine, rel=1e-9)
    assert ours(total, "linear", final=final) == pytest.approx(linear, rel=1e-9)


@pytest.mark.parametrize("warmup", [2, 5, 40])
def test_schedule_begins_after_linear_warmup(warmup: int) -> None:
    rise = torch_rates(lr_scheduler.LinearLR, warmup, 0.3, start_factor=1 / warmup, total_iters=warmup - 1)
    fall = torch_rates(lr_scheduler.CosineAnnealingLR, 60, 0.3, T_max=60)
    assert ours(60 + warmup, "constant", warmup=warmup) == pytest.approx(rise + [0.3] * 60, rel=1e-9)
    assert ours(60 + warmup, "cosine", warmup=warmup) == pytest.approx(rise + fall, rel=1e-9)


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "one_cycle"])
@pytest.mark.parametrize("warmup", [0, 1, 7, 50, 80])
def test_rate_is_pure_function_of_step(name: ScheduleName, warmup: int) -> None:
    """Steps in any order give the same rates: positive, finite, at most the peak, however long the warm-up."""
    in_order = ours(50, name, warmup=warmup)
    schedule = LearningRate(0.3, 50, name, warmup)
    steps = random.Random(0).sample(range(50), 50)
    assert {step: schedule.at(step) for step in steps} == dict(enumerate(in_order))
    assert all(math.isfinite(rate) and 0 < rate <= 0.3 * (1 + 1e-12) for rate in in_order)
