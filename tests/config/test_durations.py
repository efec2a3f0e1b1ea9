"""Durations, `is_due`, and the learning rate compared with torch's schedulers."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import SGD, lr_scheduler

from dist_train.config.durations import Duration, is_due
from dist_train.config.loading import parse_config
from dist_train.config.schedule import SCHEDULES
from dist_train.errors import ConfigError, UserCodeError
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


def ours(total: int, name: str, warmup: int = 0, final: float = 0.0, **settings: Any) -> list[float]:
    schedule = LearningRate(0.3, total, name, warmup, final, **settings)
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


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_polynomial_equals_torch(power: float) -> None:
    theirs = torch_rates(lr_scheduler.PolynomialLR, 30, 0.3, total_iters=30, power=power)
    assert ours(30, "polynomial", power=power) == pytest.approx(theirs, rel=1e-9)


def test_step_equals_torch() -> None:
    even = torch_rates(lr_scheduler.StepLR, 30, 0.3, step_size=7, gamma=0.5)
    assert ours(30, "step", step_size=7, gamma=0.5) == pytest.approx(even, rel=1e-9)
    listed = torch_rates(lr_scheduler.MultiStepLR, 30, 0.3, milestones=[4, 20], gamma=0.1)
    assert ours(30, "step", milestones=(4, 20)) == pytest.approx(listed, rel=1e-9)


@pytest.mark.parametrize("t_mult", [1, 3])
@pytest.mark.parametrize("warmup", [0, 4])
def test_cosine_restarts_equals_torch(t_mult: int, warmup: int) -> None:
    kwargs = {"T_0": 6, "T_mult": t_mult, "eta_min": 0.03}
    theirs = torch_rates(lr_scheduler.CosineAnnealingWarmRestarts, 60, 0.3, **kwargs)
    found = ours(60 + warmup, "cosine_restarts", warmup=warmup, final=0.1, t_0=6, t_mult=t_mult)
    assert found[warmup:] == pytest.approx(theirs, rel=1e-9)
    assert found[:warmup] == sorted(found[:warmup])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 7, 50, 80])
def test_rate_is_pure_function_of_step(name: str, warmup: int) -> None:
    """Steps in any order give the same rates: positive, finite, at most the peak, however long the warm-up."""
    settings: Any = {"step": {"step_size": 9}, "cosine_restarts": {"t_0": 5, "t_mult": 2}}.get(name, {})
    in_order = ours(50, name, warmup=warmup, **settings)
    schedule = LearningRate(0.3, 50, name, warmup, **settings)
    steps = random.Random(0).sample(range(50), 50)
    assert {step: schedule.at(step) for step in steps} == dict(enumerate(in_order))
    assert all(math.isfinite(rate) and 0 < rate <= 0.3 * (1 + 1e-12) for rate in in_order)


def test_schedule_settings_in_epochs() -> None:
    """Epochs become steps of the run; the peak is lr after its scaling."""
    schedule = {"name": "step", "milestones": ["2 epochs", "1 epochs"], "warmup": "0.5 epochs", "gamma": 0.5}
    config = parse_config({"train_for": "3 epochs", "optimizer": {"lr": 0.8}, "schedule": schedule})
    rate = LearningRate.of(config, steps_per_epoch=4)
    assert [rate.at(step) for step in range(12)] == [0.4, 0.8, 0.8, 0.8, *[0.4] * 4, *[0.2] * 4]


def test_own_schedule() -> None:
    def of(name: str) -> LearningRate:
        config = parse_config({"train_for": "8 steps", "optimizer": {"lr": 0.5}, "schedule": {"name": name}})
        return LearningRate.of(config, steps_per_epoch=4)

    assert [of("support.user_optimizers:halved").at(step) for step in range(8)] == [0.5] * 4 + [0.25] * 4
    for name, why in {
        "negative": r"schedule\.name=support.user_optimizers:negative returns -1 for \(7, 8\): make it lr / peak",
        "of_one": r"schedule\.name=support.user_optimizers:of_one fails for \(0, 8\): .*: TypeError: of_one\(\) takes",
        "absent": r"has no absent\. Found: .*halved",
    }.items():
        with pytest.raises(UserCodeError, match=why):
            of(f"support.user_optimizers:{name}")


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"name": "Step"}, r"schedule\.name=Step: no such schedule\. Did you mean step\? Names: constant, .*:function"),
        ({"name": "cosine", "gamma": 0.5}, "schedule: cosine has no gamma. Its settings: none"),
        ({"name": "polynomial", "t_0": 5}, "schedule: polynomial has no t_0. Its settings: power"),
        ({"name": "step"}, "schedule: step takes step_size, .* or milestones"),
        ({"name": "step", "step_size": 5, "milestones": [5]}, "schedule: step takes step_size, .* or milestones"),
        ({"name": "step", "step_size": 0}, r"schedule\.step_size=0: it must be longer than zero"),
        ({"name": "step", "milestones": ["2 epochs", 0]}, r"schedule\.milestones\.1=0: it must be longer than zero"),
        ({"name": "step", "milestones": ["3 s"]}, r"schedule\.milestones\.0=3 s: write it in steps or epochs"),
        ({"name": "cosine_restarts"}, "schedule: cosine_restarts needs t_0"),
        ({"name": "my:fall", "warmup": 5}, "schedule: my:fall returns lr / peak at every step: leave out warmup"),
    ],
)
def test_schedule_settings_that_do_not_fit(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_config({"schedule": settings})
