"""Side effects of a net are found in the warm-up and reported, and leave no trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_train.config.loading import parse_config
from dist_train.distributed.world import World
from dist_train.errors import UserCodeError
from support.ranks import join_group, run_on_ranks, train_on_ranks
from support.run_files import assert_bit_identical
from support.tiny_runs import new_step

DROPOUT = "dropout (drawn per rank and micro-batch)"
DRAWS = "random numbers in forward (drawn per rank and micro-batch)"


class Net(nn.Module):
    def __init__(self, *middle: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), *middle, nn.Linear(4, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.layers(inputs)
        return logits


class Caching(Net):
    """Stores its output, as hooks and some losses need it; the next forward overwrites it."""

    def forward(self, inputs: Tensor) -> Tensor:
        self.output = super().forward(functional.dropout(inputs, 0.5))
        return self.output


class Counting(Net):
    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(inputs)


class OwnGenerators(Net):
    def __init__(self) -> None:
        super().__init__()
        self.numpy, self.torch = np.random.default_rng(0), torch.Generator()

    def forward(self, inputs: Tensor) -> Tensor:
        noise = torch.rand(inputs.shape, generator=self.torch)
        return super().forward(inputs + noise * self.numpy.random())


class Running(Net):
    """A running mean over forwards: a plain tensor, or a buffer that is reassigned."""

    mean: Tensor

    def __init__(self, registered: bool) -> None:
        super().__init__()
        if registered:
            self.register_buffer("mean", torch.zeros(()))
        else:
            self.mean = torch.zeros(())

    def forward(self, inputs: Tensor) -> Tensor:
        self.mean = 0.999 * self.mean + 0.001 * inputs.mean().detach()
        return super().forward(inputs)


class Numpy(Net):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs * float(np.random.rand()))


class Weighted(Net):
    def __init__(self) -> None:
        super().__init__()
        self.loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 20.0, 5.0]))


class Sum(Net):
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(output, target, reduction="sum")


class Mean(Net):
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(output, target, label_smoothing=0.1)


class Centered(Net):
    """The loss itself keeps a running mean."""

    center: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(3))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            self.center += output.mean(dim=0)
        return functional.cross_entropy(output, target)


class OfAnotherType(Net):
    """A buffer that the forward reassigns with another type."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(0))

    def forward(self, inputs: Tensor) -> Tensor:
        self.scale = inputs.abs().max()
        return super().forward(inputs)


class WithKept(Net):
    """The loss needs what the forward has stored: it cannot be computed on a part."""

    def forward(self, inputs: Tensor) -> Tensor:
        self.inputs = inputs
        return super().forward(inputs)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(output, target) + (output[:, :3] - self.inputs[:, :3]).square().mean()


spectral_norm = nn.utils.parametrizations.spectral_norm


@pytest.mark.parametrize(
    ("make", "dependent", "unsaved"),
    [
        (Net, [], []),
        (lambda: Net(nn.LayerNorm(4), nn.GELU()), [], []),
        (lambda: Net(nn.Dropout(0.2)), [DROPOUT], []),
        (Caching, [DROPOUT], []),
        (lambda: Net(nn.RReLU()), [DRAWS], []),
        (Numpy, [DRAWS], []),
        (
            lambda: Net(spectral_norm(nn.Linear(4, 4))),
            ["layers.1.parametrizations.weight.0._u and 1 more (changed"],
            [],
        ),
        (Counting, [], ["calls"]),
        (OwnGenerators, [], ["numpy", "torch"]),
        (lambda: Running(registered=False), [], ["mean"]),
        (lambda: Running(registered=True), ["mean (changed by each forward)"], []),
        (Weighted, ["the loss ("], []),
        (Sum, ["the loss ("], []),
        (Mean, [], []),
        (WithKept, [], []),
        (Centered, ["center (changed by each forward)"], []),
        (OfAnotherType, ["scale (changed by each forward)"], []),
    ],
)
def test_division_dependence_and_unsaved_state_are_named(
    make: Callable[[], nn.Module], dependent: list[str], unsaved: list[str], world: World
) -> None:
    step = new_step(world, 0, make_net=make)
    buffers = [(name, buffer, buffer.clone()) for name, buffer in step.net.named_buffers()]
    step.warm_up(0)
    causes = step.effects.world_size_dependent
    assert len(causes) == len(dependent)
    assert all(one.startswith(beginning) for one, beginning in zip(causes, dependent, strict=True)), causes
    assert step.effects.unsaved == unsaved
    for name, buffer, value in buffers:
        assert step.net.get_buffer(name) is buffer
        assert torch.equal(buffer, value)


# --- user code may modify its batch --------------------------------------------------------------------------------

SHIFTED: dict[str, Any] = {
    "data": {"name": "support.user_sets:FromOne"},
    "model": {"name": "support.user_nets:Shifting"},
    "global_batch_size": 12,
    "final_train_eval": False,
    "train_for": "8 steps",
    "log_every": 1,
    "eval_every": "4 steps",
}


def test_targets_may_be_changed_in_place(tmp_path: Path) -> None:
    """By a loss that shifts labels starting at 1: in the warm-up, each step, evaluations and after a resume."""
    train_on_ranks(SHIFTED, tmp_path / "whole")
    train_on_ranks(SHIFTED, tmp_path / "resumed", stop_after=3)
    train_on_ranks(SHIFTED, tmp_path / "resumed")
    assert_bit_identical(tmp_path / "resumed", tmp_path / "whole")


# --- resumed with another division of the batch ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "effect"),
    [
        ("mlp", "equal within rounding, not bit-identical"),
        ("support.user_sets:WithDropout", f"the result changes, since it depends on {DROPOUT}"),
    ],
)
def test_changed_division_is_logged_at_resume(net: str, effect: str, tmp_path: Path) -> None:
    settings = SHIFTED | {"data": {"name": "support.user_sets:Jittered"}, "model": {"name": net}}
    train_on_ranks(settings, tmp_path / "r", stop_after=3)
    train_on_ranks(settings | {"per_device_batch_size": 4}, tmp_path / "r")
    log = (tmp_path / "r/logs/rank_00000.log").read_text()
    assert f"resumed with a different micro_steps: 1 -> 3: {effect}\n" in log


# --- an unused layer --------------------------------------------------------------------------------------------------


class Unused(Net):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(4, 4)


def warm_up_with_unused(find_unused: bool) -> None:
    join_group("unused")
    config = parse_config({"device": "cpu", "ddp": {"find_unused_parameters": find_unused}})
    step = new_step(World.join(config), 0, config=config, make_net=Unused)
    if find_unused:
        step.warm_up(0)
        step.take(0)
    else:
        with pytest.raises(UserCodeError, match=r"to spare\.weight and 1 more of Unused.* ddp\.find_unused_parameters"):
            step.warm_up(0)


@pytest.mark.parametrize("find_unused", [False, True])
def test_unused_layer_is_named(find_unused: bool) -> None:
    run_on_ranks(warm_up_with_unused, find_unused, world_size=2)
