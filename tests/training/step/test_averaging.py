"""Averaged weights: tensors with a meaningful average are averaged, the others are copied."""

from __future__ import annotations

import warnings
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dist_train.errors import UserCodeError
from dist_train.training.step.weight_averaging import AveragedNet

DECAY = 0.9


class Net(nn.Module):
    """A net with all kinds of tensors; each forward changes some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 4), nn.BatchNorm1d(4), nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        )
        self.scale = nn.Parameter(torch.ones(4, dtype=torch.complex64))
        self.steps = nn.Parameter(torch.tensor(7), requires_grad=False)
        self.register_buffer("index", torch.arange(1000).flip(0))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("noise", torch.zeros(3))

    def forward(self, inputs: Tensor) -> Tensor:
        self.noise = torch.rand(3)  # another tensor under the same name
        outputs: Tensor = self.layers(inputs)
        return outputs * self.scale.real


def averaged_net(steps: int = 5) -> tuple[Net, AveragedNet, list[dict[str, Tensor]]]:
    """A net, its average, and the states of the net after each of its updates."""
    torch.manual_seed(0)
    net = Net()
    ema, states = AveragedNet(net, DECAY), []
    for number in range(steps):
        net(torch.randn(8, 4))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.ones_like(parameter))
        ema.update(net, is_first=number == 0)
        states.append(deepcopy(net.state_dict()))
    return net, ema, states


def test_each_tensor_is_averaged_or_copied() -> None:
    net, ema, states = averaged_net()
    running = {"layers.1.running_mean", "layers.1.running_var"}
    averaged = {name for name, value in net.named_parameters() if name != "steps"} | running
    for name, actual in ema.module.state_dict().items():
        expected = states[0][name]
        for state in states[1:]:
            expected = DECAY * expected + (1 - DECAY) * state[name] if name in averaged else state[name]
        torch.testing.assert_close(actual, expected)
        assert torch.equal(actual, net.state_dict()[name]) == (name not in averaged), name


def test_state_and_weights_equal_torch() -> None:
    """Checkpoints of torch's AveragedModel load, and continue bit-identically."""
    net, ema, _ = averaged_net()
    theirs = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    assert ema.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ema.state_dict())
    ema.update(net, is_first=False)
    theirs.update_parameters(net)
    assert ema.n_averaged == theirs.n_averaged == 6
    for (name, actual), expected in zip(ema.module.named_parameters(), theirs.module.parameters(), strict=True):
        assert name == "steps" or torch.equal(actual, expected), name


def test_net_that_cannot_be_copied_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it is deprecated
        old = nn.Sequential(nn.utils.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(UserCodeError, match=r"its 0\.weight is computed .*parametrizations\.weight_norm"):
        AveragedNet(old, DECAY)
    locked = nn.Sequential(nn.Linear(2, 2))
    locked.reader = (each for each in range(2))  # type: ignore[assignment]
    with pytest.raises(UserCodeError, match=r"Sequential cannot be copied: TypeError: .* Set ema_decay=null"):
        AveragedNet(locked, DECAY)
