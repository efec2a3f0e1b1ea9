"""Loss and metrics, where user code could make the numbers wrong."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_train.config.batch_plan import BatchPlan
from dist_train.config.data import DataConfig
from dist_train.config.loading import parse_config
from dist_train.data.batches import training_batches
from dist_train.data.sampler import ShardSampler
from dist_train.data.sets.image_set import ImageSet
from dist_train.distributed.world import World
from dist_train.errors import ConfigError, UserCodeError
from dist_train.models.tasks.losses import loss_of
from dist_train.models.tasks.objective import ErrorContext, Objective, count_correct
from dist_train.training.step.lr_schedule import LearningRate
from dist_train.training.step.train_step import Step


class Net(nn.Module):
    answer: Any = {}

    def forward(self, images: Tensor) -> Tensor:
        return images

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square()

    def metrics(self, output: Tensor, target: Tensor) -> Any:
        return self.answer


def test_harness_metrics_cannot_be_overwritten() -> None:
    net = Net()
    net.answer = {"loss": 7.0, "f1": 0.5}
    with pytest.raises(UserCodeError, match="must not return loss"):
        Objective(net).metrics(torch.zeros(2), torch.zeros(2))
    net.answer = {"f1": torch.tensor(0.5)}
    assert Objective(net).metrics(torch.zeros(2), torch.zeros(2)) == {"f1": 0.5}


def test_half_precision_output_is_converted_to_fp32() -> None:
    half, double = torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float64)
    for inputs in (half, [half, 3], {"logits": half}, (half, {"features": [half.half()]})):
        output = Objective(Net()).forward(nn.Identity(), inputs)
        assert type(output) is type(inputs)
        assert "torch.float16" not in repr(output)
        assert "bfloat16" not in repr(output)
    assert Objective(Net()).forward(nn.Identity(), double) is double
    unchanged = defaultdict(list, {"logits": double})
    assert Objective(Net()).forward(nn.Identity(), unchanged) is unchanged


def test_loss_per_example_is_rejected() -> None:
    with pytest.raises(UserCodeError, match=r"one number.*shape \[2\]"):
        Objective(Net()).loss(torch.zeros(2), torch.zeros(2))


def test_label_smoothing_with_own_loss_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"label_smoothing=0\.1"):
        loss_of(Net(), parse_config({"label_smoothing": 0.1}))


def test_accuracy_is_counted_only_for_classifiers() -> None:
    labels = torch.tensor([0, 1, 1])
    assert count_correct(torch.eye(3)[:, :2], labels) == 2
    assert count_correct(torch.zeros(3, 1), labels) is None  # one output: argmax would always be 0
    assert count_correct(torch.zeros(3), labels.float()) is None
    assert count_correct([torch.zeros(3, 2)], labels) is None


class TwoInputs(nn.Module):
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return first + second


def test_inputs_are_unpacked_for_net_with_several_arguments() -> None:
    pair = [torch.ones(2), torch.ones(2)]
    assert Objective(TwoInputs()).forward(TwoInputs(), pair).tolist() == [2, 2]
    assert Objective(Net()).forward(Net(), pair) is pair


# --- output and targets that cross-entropy does not accept -------------------------------------------------------


class Plain(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images


LOGITS, LABELS = torch.zeros(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])


@pytest.mark.parametrize(
    ("output", "targets", "expected"),
    [
        ((LOGITS, LOGITS), LABELS, r"Plain returns \(float32 \[6, 4\], float32 \[6, 4\]\), but .* needs logits \[B, K"),
        (torch.zeros(6, 1), LABELS * 0, r"Plain returns float32 \[6, 1\]"),
        (torch.zeros(6), torch.zeros(6), r"Plain returns float32 \[6\]"),
        (LOGITS, LABELS.double(), r"The targets are float64 \[6\], but .* needs labels, int64 \[6\]"),
        (LOGITS, LABELS.int(), r"The targets are int32 \[6\]"),
        (LOGITS, LABELS[:, None], r"The targets are int64 \[6, 1\]"),
        (LOGITS, {"label": LABELS}, r"The targets are {label: int64 \[6\]}"),
        (LOGITS, torch.tensor([0, 1, 2, 3, 4, 0]), "Example 13 of list has label 4, but Plain has 4 classes, 0 to 3"),
        (LOGITS, torch.tensor([0, 1, 2, 3, 4, -1]), "Example 13 of list has label 4"),
        (torch.zeros(6, 4, 2), torch.full((6, 2), 3).index_fill(0, torch.tensor(4), -2), "Example 13 .* label -2"),
    ],
    ids=["tuple", "one output", "no batch", "floats", "int32", "a column", "dict", "label", "two labels", "pixels"],
)
def test_mismatched_output_and_targets_are_shown(output: Any, targets: Any, expected: str) -> None:
    """The check before the first step shows it, and the loss if it fails."""
    objective = Objective(Plain())
    examples: Any = []
    indices = torch.tensor([3, 5, 7, 11, 13, 17])
    with pytest.raises(UserCodeError, match=expected), ErrorContext(Plain(), "at step 3", indices, examples):
        objective.check(output, targets)
    if "returns float32" not in expected:  # torch computes a loss of these, though a meaningless one
        with pytest.raises(UserCodeError, match=expected), ErrorContext(Plain(), "at step 3", indices, examples):
            objective.loss(output, targets)


def test_valid_output_and_targets_are_accepted() -> None:
    for output, targets in ((LOGITS, LABELS), (LOGITS, LABELS.to(torch.uint8)), (LOGITS, LOGITS.softmax(1)),
                            (torch.zeros(6, 4, 2), torch.zeros(6, 2, dtype=torch.int64))):  # fmt: skip
        Objective(Plain()).check(output, targets)
        assert Objective(Plain()).loss(output, targets).isfinite()
    Objective(Net()).check((LOGITS, LOGITS), None)  # the net has its own loss


def test_labels_are_checked_on_host() -> None:
    """A GPU kernel must not read them first: after a device-side assert nothing can be read."""
    with pytest.raises(UserCodeError, match="label 4"):
        Objective(Plain()).check_labels(LOGITS, LABELS + 1)
    Objective(Plain()).check_labels(LOGITS, None)
    Objective(Net()).check_labels(LOGITS, LABELS + 1)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus.")])
def test_errors_outside_net_pass_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)), ErrorContext(Plain(), "at step 3", LABELS, torch.zeros(6)):  # type: ignore[arg-type]
        raise error


def test_all_labels_of_resident_set_are_checked_before_first_step(world: World) -> None:
    """A compiled step or a CUDA graph could not report a wrong label later."""
    train = ImageSet(torch.zeros(40, 1, 4, 4, dtype=torch.uint8), torch.arange(40) % 3, ("a", "b", "c", "d"))
    train.labels[17] = 3
    plan = BatchPlan.fit(4, 4, 1)
    sampler = ShardSampler(len(train), plan, 0, 0)
    assert 17 not in sampler.indices(0)
    batches = training_batches(train, sampler, DataConfig(), world.device, 0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    step = Step(
        parse_config({"device": "cpu", "global_batch_size": 4}), world, net, batches, plan, LearningRate(0.1, 9)
    )
    with pytest.raises(UserCodeError, match=r"Example 17 of ImageSet has label 3, but \w+ has 3 classes, 0 to 2"):
        step.warm_up(0)
