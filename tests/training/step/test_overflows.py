"""fp16: updates with non-finite gradients are skipped and counted. With torch's own scaler, also available on a CPU."""

from __future__ import annotations

import pytest
import torch

from dist_train.distributed.world import World
from dist_train.training.step.counts import Overflows
from dist_train.training.step.train_step import Step
from support.tiny_runs import new_step


@pytest.fixture
def step(world: World, monkeypatch: pytest.MonkeyPatch) -> Step:
    monkeypatch.setattr(world.accelerator, "scaler", torch.amp.GradScaler("cpu", init_scale=2.0**8))
    return new_step(world, 0)


def overflows_of(step: Step) -> Overflows:
    assert step.eager.overflows is not None
    return step.eager.overflows


def take(step: Step, first: int, count: int, *, overflowing: bool) -> None:
    parameter = next(step.net.parameters())
    hook = parameter.register_hook(lambda gradient: gradient / 0 if overflowing else gradient)
    for number in range(first, first + count):
        step.take(number)
    hook.remove()


def test_overflows_are_counted(step: Step) -> None:
    take(step, 0, 2, overflowing=False)
    before = [parameter.clone() for parameter in step.net.parameters()]
    take(step, 2, 3, overflowing=True)
    assert all(torch.equal(old, new) for old, new in zip(before, step.net.parameters(), strict=True))
    take(step, 5, 1, overflowing=False)
    assert not torch.equal(before[0], next(step.net.parameters()))
    take(step, 6, 2, overflowing=True)
    assert overflows_of(step).pop() == (5, 3)
    take(step, 8, 1, overflowing=True)
    assert overflows_of(step).pop() == (1, 3)  # three in a row, across the last call


def test_resumed_run_continues_counts(step: Step) -> None:
    take(step, 0, 3, overflowing=True)
    saved = {name: value.clone() if name == "overflows" else value for name, value in step.state_dict().items()}
    take(step, 3, 4, overflowing=False)
    overflows_of(step).pop()
    step.load_state_dict(saved)
    take(step, 3, 1, overflowing=True)
    assert overflows_of(step).pop() == (4, 4)
