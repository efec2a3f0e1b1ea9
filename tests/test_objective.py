"""What is minimised and measured, where user code could make the numbers wrong."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_train.errors import ConfigError, UserCodeError
from dist_train.objective import Objective, count_correct


class Net(nn.Module):
    answer: Any = {}

    def forward(self, images: Tensor) -> Tensor:
        return images

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square()

    def metrics(self, output: Tensor, target: Tensor) -> Any:
        return self.answer


def test_our_own_counts_cannot_be_overwritten() -> None:
    net = Net()
    net.answer = {"loss": 7.0, "f1": 0.5}
    with pytest.raises(UserCodeError, match="must not return loss"):
        Objective(net).metrics(torch.zeros(2), torch.zeros(2))
    net.answer = {"f1": torch.tensor(0.5)}
    assert Objective(net).metrics(torch.zeros(2), torch.zeros(2)) == {"f1": 0.5}


def test_an_output_of_half_precision_is_no_basis_for_a_count() -> None:
    half, whole = torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float64)
    for made in (half, [half, 3], {"logits": half}, (half, {"features": [half.half()]})):
        found = Objective(Net()).forward(nn.Identity(), made)
        assert type(found) is type(made)
        assert "torch.float16" not in repr(found)
        assert "bfloat16" not in repr(found)
    assert Objective(Net()).forward(nn.Identity(), whole) is whole
    kept = defaultdict(list, {"logits": whole})
    assert Objective(Net()).forward(nn.Identity(), kept) is kept


def test_a_loss_per_example_is_refused() -> None:
    with pytest.raises(UserCodeError, match=r"one number.*shape \[2\]"):
        Objective(Net()).loss(torch.zeros(2), torch.zeros(2))


def test_label_smoothing_beside_an_own_loss_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"label_smoothing=0\.1"):
        Objective(Net(), label_smoothing=0.1)


def test_accuracy_only_where_there_is_right_and_wrong() -> None:
    labels = torch.tensor([0, 1, 1])
    assert count_correct(torch.eye(3)[:, :2], labels) == 2
    assert count_correct(torch.zeros(3, 1), labels) is None  # one output: argmax would always say 0
    assert count_correct(torch.zeros(3), labels.float()) is None
    assert count_correct([torch.zeros(3, 2)], labels) is None


class TwoInputs(nn.Module):
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return first + second


def test_inputs_are_passed_as_the_net_takes_them() -> None:
    pair = [torch.ones(2), torch.ones(2)]
    assert Objective(TwoInputs()).forward(TwoInputs(), pair).tolist() == [2, 2]
    assert Objective(Net()).forward(Net(), pair) is pair
