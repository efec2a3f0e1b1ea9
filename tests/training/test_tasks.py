"""Losses of the three tasks: the same for any division of the batch, also where examples have different weights."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from dist_train.cli import main
from dist_train.config.loading import parse_config
from dist_train.data.class_weights import class_weights
from dist_train.data.sets.image_set import ImageSet, Subset, subset_of
from dist_train.errors import ConfigError
from dist_train.models.registry import build_model
from dist_train.models.tasks.losses import TargetMismatch, loss_of
from dist_train.models.tasks.objective import Objective
from support.divisions import check_every_division
from support.ranks import train_on_ranks
from support.run_files import largest_difference, metrics, train_losses, weights
from support.trainings import MNIST
from support.user_sets import Jittered, TwoDigits, mnist_part

STEPS = 6
RUN: dict[str, Any] = MNIST | {
    "dtype": "float64", "step_mode": "eager", "train_for": f"{STEPS} steps", "log_every": 1, "eval_every": 3,
}  # fmt: skip
DIGITS: dict[str, Any] = MNIST["data"] | {"name": "support.user_sets:mnist_part"}
ODD = [float(number % 3) for number in range(10)]  # four classes do not count at all
TASKS: dict[str, dict[str, Any]] = {
    "balanced": {"data": DIGITS, "class_weights": "balanced"},
    "weighted": {"data": DIGITS, "class_weights": ODD, "label_smoothing": 0.1},
    "mixed": {"data": DIGITS | {"augment": {"mixup_alpha": 0.4}}, "class_weights": ODD, "ignore_index": 7},
    "ignoring": {"data": DIGITS, "class_weights": ODD, "ignore_index": 7},
    "multi-label": {"data": {"name": "support.user_sets:TwoDigits"}, "task": "multi_label", "metrics": ["f1"]},
    "regression": {
        "data": {"name": "support.user_sets:Tilted"}, "task": "regression", "loss": "huber", "metrics": ["r2", "mae"],
        "model": {"name": "mlp", "args": {"num_classes": 1}},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_run_is_equal_for_every_division_and_resume(name: str, tmp_path: Path) -> None:
    """On one process stopped in the middle, to the bit; begun on two in micro-batches and resumed on three."""
    whole = check_every_division(RUN | TASKS[name], tmp_path, STEPS, 3, [(2, 3), (3, None)])
    for run in (whole, tmp_path / "divided"):
        last = [line for line in metrics(run) if "val/loss" in line][-1]
        assert ("val/accuracy" in last) == (name in ("balanced", "weighted"))
    losses = [json.loads((run / "result.json").read_text())["test/loss"] for run in (whole, tmp_path / "divided")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-10)


@pytest.mark.parametrize(
    ("name", "answer", "exported"),
    [
        ("multi-label", r"picture.png: \d \d+\.\d%, \d \d+\.\d%, \d \d+\.\d%", r"\[\[.*\]\]"),
        ("regression", r"picture.png: -?\d+\.?\d*(e-\d+)?", r"\[\[-?\d\.\d+(e-\d+)?\]\]"),
    ],
)
def test_net_answers_in_the_terms_of_its_task(name: str, answer: str, exported: str, tmp_path: Path) -> None:
    train_on_ranks(RUN | TASKS[name] | {"train_for": "2 steps"}, tmp_path / "r")
    Image.new("L", (28, 28), 100).save(tmp_path / "picture.png")
    asked = CliRunner().invoke(main, ["predict", str(tmp_path / "r"), str(tmp_path / "picture.png")])
    assert re.fullmatch(answer, asked.output.strip().rpartition("/")[2]), asked.output
    assert CliRunner().invoke(main, ["export", str(tmp_path / "r"), str(tmp_path / "out")]).exit_code == 0
    done = subprocess.run([sys.executable, tmp_path / "out/load.py"], capture_output=True, text=True, check=True)
    assert re.fullmatch(exported, done.stdout.strip()), done.stdout


# --- weights ---------------------------------------------------------------------------------------------------------


def by_hand(images: Tensor, labels: Tensor, steps: int, **loss: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Train mlp by SGD on one batch with torch's cross-entropy; return its losses and, at the end, its weights."""
    torch.set_default_dtype(torch.float64)
    try:
        net = build_model(parse_config({}).model, {"in_channels": 1, "num_classes": 10, "image_size": 28}, seed=0)
        optimizer, losses = torch.optim.SGD(net.parameters(), lr=0.1), []
        for _ in range(steps):
            optimizer.zero_grad()
            value = functional.cross_entropy(net(images.double() / 255), labels, **loss)
            value.backward()
            optimizer.step()
            losses.append(value.item())
        losses.append(functional.cross_entropy(net(images.double() / 255), labels, **loss).item())
        return losses, net.state_dict()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("world_size", [1, 3])
def test_weighted_loss_is_that_of_torch_over_the_whole_batch(world_size: int, tmp_path: Path) -> None:
    settings = RUN | {
        "data": {"name": "support.user_sets:mnist_part"}, "optimizer": {"name": "sgd", "lr": 0.1}, "eval_every": 0,
        "train_for": "3 steps", "global_batch_size": 960, "final_train_eval": True,
        "class_weights": ODD, "label_smoothing": 0.1, "ignore_index": 7,
    }  # fmt: skip
    train_on_ranks(settings, tmp_path / "r", world_size)
    digits = mnist_part(True)
    options: dict[str, Any] = {"weight": torch.tensor(ODD).double(), "label_smoothing": 0.1, "ignore_index": 7}
    losses, expected = by_hand(digits.images, digits.labels, 3, **options)
    result = json.loads((tmp_path / "r/result.json").read_text())
    assert [*train_losses(tmp_path / "r"), result["train/loss"]] == pytest.approx(losses, rel=1e-12)
    assert largest_difference(weights(tmp_path / "r"), expected) < 1e-12


def test_step_in_which_nothing_counts_changes_nothing(tmp_path: Path) -> None:
    """No NaN: its loss and gradient are zero, on each rank and in each micro-batch."""
    settings = RUN | {
        "data": {"name": "test_tasks:of_class_3", "args": {"but": 1}}, "ignore_index": 3, "global_batch_size": 12,
        "optimizer": {"name": "sgd", "lr": 0.1}, "per_device_batch_size": 3, "train_for": "8 steps", "eval_every": 0,
    }  # fmt: skip
    train_on_ranks(settings, tmp_path / "r", world_size=2)
    losses, norms = train_losses(tmp_path / "r"), [line["train/grad_norm"] for line in metrics(tmp_path / "r")
                                                   if "train/grad_norm" in line]  # fmt: skip
    assert sum(loss > 0 for loss in losses) == sum(norm > 0 for norm in norms) == 1  # that of the example that counts
    assert losses.count(0) == norms.count(0) == 7


def of_class_3(train: bool, but: int) -> ImageSet:
    """Return 96 digits of class 3, `but` of them of class 4."""
    digits = mnist_part(train)
    labels = torch.full((96,), 3)
    labels[:but] = 4
    return ImageSet(digits.images[:96], labels, digits.classes)


def test_split_in_which_nothing_counts_is_refused(tmp_path: Path) -> None:
    settings = RUN | {"data": {"name": "test_tasks:of_class_3", "args": {"but": 0}}, "ignore_index": 3}
    with pytest.raises(AssertionError, match=r"None of the 96 examples counts in the loss: see ignore_index"):
        train_on_ranks(settings, tmp_path / "r")


def test_balanced_weights_are_those_of_the_examples_trained_on() -> None:
    digits = mnist_part(True)
    config, cpu = parse_config({"class_weights": "balanced"}), torch.device("cpu")
    kept = torch.arange(200)
    counts = digits.labels[kept].bincount(minlength=10)
    expected = (200 / (10 * counts)).tolist()
    for examples in (subset_of(digits, kept), Subset(Subset(Labelled(digits.labels), range(500)), kept)):
        found = class_weights(config, examples, 10, cpu)
        assert found is not None
        assert found.tolist() == pytest.approx(expected)
        assert float(found[digits.labels[kept]].mean()) == pytest.approx(1)
    ignoring = class_weights(parse_config({"class_weights": "balanced", "ignore_index": 3}), digits, 10, cpu)
    assert ignoring is not None
    assert float(ignoring[3]) == 0
    assert float(ignoring[digits.labels[digits.labels != 3]].mean()) == pytest.approx(1)
    with pytest.raises(ConfigError, match=r"class_weights=balanced: class 10 has none of the 960 training examples"):
        class_weights(config, digits, 11, cpu)
    with pytest.raises(ConfigError, match=r"class_weights=balanced needs the class of each training example"):
        class_weights(config, TwoDigits(True), 10, cpu)


class Labelled(Jittered):
    def __init__(self, labels: Tensor) -> None:
        super().__init__(True, len(labels))
        self.targets = labels


# --- what is refused -------------------------------------------------------------------------------------------------


class Net(nn.Module):
    pass


class Own(nn.Module):
    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        return (output - targets).mean()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss": "mse"}, "loss=mse: it is for task=regression, and this is task=classification. Set task=reg"),
        (
            {"task": "regression", "loss": "bce"},
            "loss=bce: it is for task=multi_label, and this is task=regression. Set task=multi_label",
        ),
        (
            {"task": "regression", "label_smoothing": 0.1},
            "Set task=classification, or label_smoothing=0.",
        ),
        (
            {"task": "multi_label", "class_weights": [1, 2]},
            "Set task=classification, or class_weights=null.",
        ),
        ({"task": "multi_label", "ignore_index": 0}, "ignore_index=0: it is for task=classification"),
        (
            {"class_weights": [0, 0]},
            "class_weights=[0, 0]: write balanced, or a list with a number for each class, 0",
        ),
        ({"task": "regression", "metrics": ["f1"]}, "task=regression has no f1. It has mae, mse, rmse, r2"),
        ({"metrics": ["mae"]}, "task=classification has no mae. It has f1, precision, recall, auroc, average"),
        (
            {"best_by": "val/psnr"},
            "best_by=val/psnr: set best_mode=max if a higher value is better, else best_mode=min",
        ),
        (
            {"best_by": "f1", "best_mode": "min"},
            "best_by=f1: best_mode=min, but the better f1 is the max. Leave best_mode out",
        ),
        ({"best_mode": "min"}, "best_mode=min needs a metric, such as best_by=val/psnr"),
    ],
)
def test_setting_that_does_not_fit_the_task_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(settings)
    assert said in str(caught.value)


@pytest.mark.parametrize("settings", [{"label_smoothing": 0.1}, {"class_weights": [1, 2]}, {"loss": "cross_entropy"}])
def test_setting_of_a_loss_that_the_net_replaces_is_refused(settings: dict[str, Any]) -> None:
    [name] = settings
    with pytest.raises(ConfigError, match=rf"{name}=.* and Own\.loss exclude each other\. Leave {name} out"):
        loss_of(Own(), parse_config(settings))


LOGITS, NUMBERS = torch.zeros(4, 3), torch.zeros(4, 1)


@pytest.mark.parametrize(
    ("settings", "output", "targets", "said"),
    [
        ({"task": "multi_label"}, LOGITS, torch.zeros(4).long(), r"needs \[4, 3\]: 0 or 1 for each.*classification"),
        ({"task": "multi_label"}, LOGITS, torch.full((4, 3), 2), "a label of 2, but task=multi_label needs 0 or 1"),
        ({"task": "multi_label"}, [LOGITS], LOGITS, r"needs logits \[B, K\]"),
        ({"task": "regression"}, LOGITS, torch.zeros(4), r"needs one number for each of its numbers"),
        ({"task": "regression"}, NUMBERS, torch.zeros(1, 4), r"needs one number for each of its numbers"),
        ({"task": "regression"}, (LOGITS,), LOGITS, "needs one tensor"),
        ({}, NUMBERS, torch.zeros(4), r"needs logits \[B, K > 1\]\. Set task=regression if it predicts numbers"),
        ({}, LOGITS, torch.zeros(4), r"needs labels, int64 \[4\].*set task=regression or task=multi_label"),
        ({"class_weights": [1, 2, 3]}, LOGITS, torch.tensor([0, 1, 2, 3], dtype=torch.uint8), "label 3, but Net has 3"),
        ({"ignore_index": -1}, LOGITS, torch.tensor([0, -1, -2, 0]), "label -2, but Net has 3 classes"),
    ],
)
def test_targets_that_do_not_fit_the_task_are_refused(
    settings: dict[str, Any], output: Any, targets: Tensor, said: str
) -> None:
    net = Net()
    objective = Objective(net, loss_of(net, parse_config(settings)))
    with pytest.raises(TargetMismatch, match=said):
        objective.check(output, targets)


def test_number_of_weights_is_that_of_the_classes() -> None:
    net = Net()
    objective = Objective(net, loss_of(net, parse_config({}), torch.ones(9)))
    with pytest.raises(TargetMismatch, match=r"class_weights has 9 numbers, but Net has 3 classes"):
        objective.check(LOGITS, torch.zeros(4).long())


def test_output_with_one_column_is_compared_row_by_row() -> None:
    """Torch alone would compare [4, 1] with [4] as 16 pairs, with a warning at most."""
    net = Net()
    objective = Objective(net, loss_of(net, parse_config({"task": "regression"})))
    targets = torch.tensor([0, 1, 2, 3])
    objective.check(NUMBERS, targets)
    assert float(objective.loss(NUMBERS, targets)) == (1 + 4 + 9) / 4


def test_probabilities_in_the_place_of_logits_are_named() -> None:
    net = Net()
    objective = Objective(net, loss_of(net, parse_config({"task": "multi_label"})))
    assert "Remove the sigmoid" in objective.doubt(torch.rand(4, 3))
    assert not objective.doubt(torch.randn(64, 3))


# --- the best checkpoint ---------------------------------------------------------------------------------------------


class Wandering(nn.Module):
    """Its own metric falls and rises, whatever it learns."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(784, 10)
        self.register_buffer("evaluated", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layer(images.flatten(1))
        return logits

    def metrics(self, output: Tensor, targets: Tensor) -> dict[str, float]:
        return {"depth": abs(float(self.layer.bias.detach().sum()))}


@pytest.mark.parametrize(
    ("settings", "better"),
    [
        ({"best_by": "val/loss"}, min),
        ({"best_by": "val/recall", "metrics": ["recall"]}, max),
        ({"best_by": "val/depth", "best_mode": "min", "model": {"name": "test_tasks:Wandering"}}, min),
    ],
)
def test_best_checkpoint_is_that_of_the_metric(settings: dict[str, Any], better: Any, tmp_path: Path) -> None:
    run = RUN | {"data": DIGITS, "eval_every": 1, "train_for": "12 steps", "optimizer": {"lr": 0.05}} | settings
    train_on_ranks(run, tmp_path / "r", stop_after=5)
    train_on_ranks(run, tmp_path / "r")
    values = {line["step"]: line[settings["best_by"]] for line in metrics(tmp_path / "r") if "val/loss" in line}
    best = better(values, key=values.__getitem__)
    manifest = json.loads((tmp_path / "r/checkpoints/best/manifest.json").read_text())
    assert manifest["step"] == best
    assert abs(manifest["score"]) == values[best]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"best_by": "val/f1"}, r"best_by=val/f1: the evaluations have loss, accuracy\. Name one of them, or add"),
        ({"best_by": "val/accuracy", "ignore_index": 3}, r"best_by=val/accuracy: the evaluations have loss\."),
        ({"best_by": "val/psnr", "best_mode": "max", "model": {"name": "test_tasks:Wandering"}},
         r"best_by=val/psnr: the evaluations have val/accuracy, val/depth, val/loss, val/seen"),
    ],
)  # fmt: skip
def test_best_by_a_metric_that_is_not_there_is_refused(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=said):
        train_on_ranks(RUN | {"data": DIGITS} | settings, tmp_path / "r")
