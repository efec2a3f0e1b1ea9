"""Promise 1: an evaluation counts every example once, for any world size, or it raises."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_train.config.loading import parse_config
from dist_train.data.evaluation_batches import EvaluationBatches
from dist_train.data.sampler import evaluation_shard
from dist_train.data.sets.image_set import ImageSet
from dist_train.data.transforms import Pixels
from dist_train.distributed.signals import StopRequest
from dist_train.distributed.world import World
from dist_train.errors import DistTrainError, TrainingDiverged, UserCodeError
from dist_train.models.tasks.objective import Objective
from dist_train.training.agreement import Agreement
from dist_train.training.evaluate import evaluate
from support.ranks import join_group, run_on_ranks

CPU = torch.device("cpu")


class Net(nn.Module):
    """A net with its own metrics (means over a batch), BatchNorm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.drop, self.linear = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)
        self.norm.running_mean = torch.tensor([0.1, 0.2, 0.3, 0.4])

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.drop(self.norm(images.flatten(1))))
        return logits

    def metrics(self, output: Tensor, targets: Tensor) -> dict[str, float]:
        return {"top2": float((output.topk(2).indices == targets[:, None]).any(1).float().mean())}


def images(length: int = 101) -> ImageSet:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (length, 1, 2, 2), dtype=torch.uint8, generator=generator)
    return ImageSet(pixels, torch.randint(3, (length,), generator=generator), ("a", "b", "c"))


def batches(
    examples: ImageSet, world: World, resident: bool = True, num_batches: int = 0, left_out: int = 0
) -> EvaluationBatches:
    """Batches of 7 of a shard without its last `left_out` examples."""
    shard = evaluation_shard(len(examples), world.rank, world.size)
    shard = shard[: len(shard) - left_out]
    longest = -(-len(examples) // world.size)
    return EvaluationBatches(
        examples, shard, 7, num_batches or -(-longest // 7), resident, Pixels(None, CPU), CPU, num_workers=0, seed=0
    )


def truth(net: Net, examples: ImageSet) -> dict[str, float]:
    """The same metrics in one pass, without code of this package."""
    net.eval()
    with torch.no_grad():
        logits = net(examples.images.float() / 255)
    correct = (logits.argmax(1) == examples.labels).sum().item()
    return {
        "loss": functional.cross_entropy(logits, examples.labels).item(),
        "top2": net.metrics(logits, examples.labels)["top2"],
        "accuracy": correct / len(examples),
        "seen": len(examples),
    }


def evaluate_on_ranks(length: int, resident: bool, folder: Path) -> None:
    join_group("evaluate")
    world = World.join(parse_config({"device": "cpu"}))
    net = Net()
    if world.rank:  # the buffers of other ranks differ: rank zero's are used
        for buffer in net.buffers():
            buffer += 5
    net.train()
    metrics = evaluate(net, batches(images(length), world, resident), Objective(net), world)
    assert net.training
    assert all(torch.equal(mine, first) for mine, first in zip(net.buffers(), Net().buffers(), strict=True))
    (folder / f"rank_{world.rank}").write_text(json.dumps(metrics))
    world.leave()


@pytest.mark.parametrize(
    ("world_size", "length", "resident"),
    [(1, 101, True), (2, 101, True), (2, 101, False), (3, 101, True), (3, 1, True)],
)
def test_every_example_counts_once(world_size: int, length: int, resident: bool, tmp_path: Path) -> None:
    """101 examples, batches of 7: shards of 51 and 50, the last batch is shorter; or a rank without examples."""
    run_on_ranks(evaluate_on_ranks, length, resident, tmp_path, world_size=world_size)
    metrics = [json.loads(path.read_text()) for path in sorted(tmp_path.iterdir())]
    assert metrics == [metrics[0]] * world_size  # the same on every rank
    expected = truth(Net(), images(length))
    assert metrics[0].keys() == expected.keys()
    assert (metrics[0]["seen"], metrics[0]["accuracy"]) == (length, expected["accuracy"])
    assert metrics[0] == pytest.approx(expected, rel=1e-6)


def evaluate_wrong_shard(folder: Path) -> None:
    join_group("wrong")
    world = World.join(parse_config({"device": "cpu"}))
    made = batches(images(), world, left_out=3 if world.rank == 1 else 0)
    net = Net()
    net.train()
    with pytest.raises(DistTrainError, match=r"Evaluation counted \d+ examples of 101"):
        evaluate(net, made, Objective(net), world)
    assert net.training
    (folder / f"rank_{world.rank}").touch()
    world.leave()


def test_wrong_shard_raises_on_every_rank(tmp_path: Path) -> None:
    run_on_ranks(evaluate_wrong_shard, tmp_path, world_size=2)
    assert len(list(tmp_path.iterdir())) == 2


# --- one rank --------------------------------------------------------------------------------------------------------


class Padded(EvaluationBatches):
    """Repeats the first examples as padding, like DistributedSampler."""

    def __iter__(self) -> Any:
        yield from super().__iter__()
        yield next(super().__iter__())


def test_extra_example_raises(world: World) -> None:
    examples, net = images(14), Net()
    made = Padded(examples, torch.arange(14), 7, 3, True, Pixels(None, CPU), CPU, 0, 0)
    with pytest.raises(DistTrainError, match="Evaluation counted 21 examples of 14"):
        evaluate(net, made, Objective(net), world)


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_restored_even_after_error(training: bool, world: World) -> None:
    net = Net().train(training)
    evaluate(net, batches(images(), world), Objective(net), world)
    assert net.training == training
    bad = ImageSet(torch.zeros(3, 2, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), ("a",))
    with pytest.raises(UserCodeError, match=r"Net failed in evaluation: .*test_evaluate\.py:\d+: RuntimeError: "):
        evaluate(net, batches(bad, world), Objective(net), world)
    assert net.training == training


def test_each_layer_keeps_its_mode(world: World) -> None:
    """A resumed run, whose layers are as the net made them, trains as one that has evaluated."""
    net = Net()
    net.norm.eval()
    evaluate(net, batches(images(), world), Objective(net), world)
    assert (net.training, net.norm.training, net.drop.training) == (True, False, True)


def test_label_outside_classes_is_reported_with_example(world: World) -> None:
    """Batches are scored together, and the example is not in the last one."""
    examples = images()
    examples.labels[38] = 3
    four = ImageSet(examples.images, examples.labels, ("a", "b", "c", "d"))

    class Plain(Net):
        metrics = None  # type: ignore[assignment]

    with pytest.raises(UserCodeError, match=r"Example 38 of ImageSet has label 3, but \w+ has 3 classes, 0 to 2"):
        evaluate(Plain(), batches(four, world), Objective(Plain()), world)


class Drawing(Net):
    """A net that is random in evaluation too, like a VAE."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images + torch.rand_like(images))


def test_random_numbers_in_evaluation_are_reproducible(world: World) -> None:
    torch.manual_seed(0)
    net = Drawing()
    first = evaluate(net, batches(images(), world), Objective(net), world)
    torch.manual_seed(1)  # whatever was done before, such as another step, or the warm-up after a resume
    assert evaluate(net, batches(images(), world), Objective(net), world) == first


def test_evaluation_changes_no_state(world: World) -> None:
    net = Net().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    first = evaluate(net, batches(images(), world), Objective(net), world)
    assert evaluate(net, batches(images(), world), Objective(net), world) == first
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_stop_request_ends_evaluation(world: World) -> None:
    request = StopRequest()
    request.request("INTERRUPT")
    net = Net().train()
    metrics = evaluate(net, batches(images(), world), Objective(net), world, Agreement(world, request, interval_s=0.0))
    assert metrics is None
    assert net.training


class Regression(Net):
    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        return functional.mse_loss(output.sum(dim=1), targets.float())

    def metrics(self, output: Tensor, targets: Tensor) -> dict[str, float]:
        return {"good": 1.0, "undefined": float("nan")}


def test_nonfinite_metrics_are_omitted_and_nonfinite_loss_raises(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """An undefined metric is named and omitted from files, which are strict JSON. Such a loss ends the run."""
    net = Regression()
    metrics = evaluate(net, batches(images(), world), Objective(net), world)
    assert metrics is not None
    assert {name for name, value in metrics.items() if math.isfinite(value)} == {"loss", "good", "accuracy", "seen"}
    assert "metrics omitted, not finite over 101 examples: undefined" in caplog.text
    nn.init.constant_(net.linear.weight, float("inf"))
    with pytest.raises(TrainingDiverged, match=r"loss over 101 examples is not finite.*Lower optimizer\.lr"):
        evaluate(net, batches(images(), world), Objective(net), world)


class OwnAccuracy(Net):
    """A net with a metric named like ours."""

    off = 0.0

    def metrics(self, output: Tensor, targets: Tensor) -> dict[str, float]:
        return {"accuracy": float((output.argmax(1) == targets).float().mean()) + self.off}


def test_accuracy_that_disagrees_with_count_is_refused(world: World) -> None:
    net = OwnAccuracy()
    metrics = evaluate(net, batches(images(), world), Objective(net), world)
    assert metrics is not None
    assert metrics["accuracy"] == truth(Net(), images())["accuracy"]
    net.off = 0.1
    with pytest.raises(
        UserCodeError, match=r"returned accuracy=0\.\d+ for a batch whose accuracy is 0\.\d+.*another name"
    ):
        evaluate(net, batches(images(), world), Objective(net), world)
