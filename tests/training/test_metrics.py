"""Metrics by torchmetrics: those of scikit-learn over the whole split, for any number of ranks and any batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from sklearn import metrics as sklearn
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from dist_train.cli import main
from dist_train.config.loading import parse_config
from dist_train.config.metric_names import Task
from dist_train.data.evaluation_batches import EvaluationBatches
from dist_train.data.sampler import evaluation_shard
from dist_train.data.sets.image_set import Examples, ImageSet, num_examples
from dist_train.data.transforms import Pixels
from dist_train.distributed.world import World
from dist_train.errors import ConfigError, DistTrainError, UserCodeError
from dist_train.models.tasks.losses import loss_of
from dist_train.models.tasks.objective import Objective
from dist_train.models.tasks.split_metrics import SplitMetrics, check_gathered, check_sums
from dist_train.runs.directory import RunDir
from dist_train.torchvision_compat import import_torchvision
from dist_train.training.evaluate import evaluate
from dist_train.web.run_view import epochs, evaluations_csv
from support.processes import DIST_TRAIN
from support.ranks import join_group, run_forked, run_on_ranks, train_on_ranks
from support.run_files import metrics

NAMES: dict[Task, list[str]] = {
    "classification": ["auroc", "f1", "precision", "recall", "top2", "average_precision"],
    "multi_label": ["auroc", "f1", "precision", "recall", "average_precision"],
    "regression": ["mae", "mse", "rmse", "r2"],
}
CPU = torch.device("cpu")
CLASSES = 5  # the last does not occur, but is predicted


class Net(nn.Module):
    """Logits that are no better than chance, so that every metric is far from 0 and 1."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(images.flatten(1))
        return logits


def images(length: int) -> ImageSet:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (length, 1, 2, 2), dtype=torch.uint8, generator=generator)
    labels = torch.arange(length) % 2 + 2 * (torch.rand(length, generator=generator) < 0.2)
    return ImageSet(pixels, labels, tuple("abcde"))


class WithTargets(Dataset[tuple[Tensor, Tensor]]):
    """The same images with several labels, or a number."""

    yields_pixels = True

    def __init__(self, task: Task, length: int) -> None:
        self.images, generator = images(length).images, torch.Generator().manual_seed(2)
        labels = (torch.rand(length, CLASSES, generator=generator) < torch.linspace(0.8, 0, CLASSES)).float()
        self.targets = labels if task == "multi_label" else torch.randn(length, generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.targets[index]


class OneNumber(Net):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)[:, :1]


def batches(examples: Examples, world: World, size: int) -> EvaluationBatches:
    length, resident = num_examples(examples), isinstance(examples, ImageSet)
    shard, longest = evaluation_shard(length, world.rank, world.size), -(-length // world.size)
    return EvaluationBatches(
        examples, shard, size, -(-longest // size), resident, Pixels(None, CPU), CPU, num_workers=0, seed=0
    )


def task_of(task: Task, length: int) -> tuple[nn.Module, ImageSet | WithTargets]:
    if task == "classification":
        return Net(), images(length)
    return (Net() if task == "multi_label" else OneNumber()), WithTargets(task, length)


def truth(task: Task, length: int) -> dict[str, float]:
    """Return what scikit-learn finds for all predictions at once."""
    net, examples = task_of(task, length)
    with torch.no_grad():
        output = net(examples.images.float() / 255)
    common: Any = {"average": "macro", "zero_division": 0}
    if isinstance(examples, ImageSet):
        targets, predicted, probabilities = examples.labels.numpy(), output.argmax(1).numpy(), output.softmax(1).numpy()
        of_task = {"top2": sklearn.top_k_accuracy_score(targets, output.numpy(), k=2, labels=range(CLASSES))}
        by_class = [(targets == each, probabilities[:, each]) for each in np.unique(targets)]
    elif task == "multi_label":
        targets, predicted, of_task = examples.targets.numpy(), (output > 0).numpy(), {}
        columns = zip(targets.T, output.sigmoid().numpy().T, strict=True)
        by_class = [(each, shares) for each, shares in columns if 0 < each.mean() < 1]
    else:
        pair = examples.targets.numpy(), output.squeeze(1).numpy()
        mse = sklearn.mean_squared_error(*pair)
        return {"mae": sklearn.mean_absolute_error(*pair), "mse": mse, "rmse": mse**0.5, "r2": sklearn.r2_score(*pair)}
    return of_task | {
        "f1": sklearn.f1_score(targets, predicted, **common),
        "precision": sklearn.precision_score(targets, predicted, **common),
        "recall": sklearn.recall_score(targets, predicted, **common),
        "auroc": np.mean([sklearn.roc_auc_score(*each) for each in by_class]),
        "average_precision": np.mean([sklearn.average_precision_score(*each) for each in by_class]),
    }


def evaluate_on_ranks(folder: Path, length: int) -> None:
    import_torchvision()
    from torchmetrics.classification import MulticlassAUROC

    order: list[list[int]] = []  # of the labels that rank zero has gathered
    forward = MulticlassAUROC.forward
    MulticlassAUROC.forward = lambda self, *pair: order.append(pair[1].tolist()) or forward(self, *pair)  # type: ignore
    join_group(f"metrics_{length}")
    world = World.join(parse_config({"device": "cpu"}))
    found = {}
    for task, names in NAMES.items():
        net, examples = task_of(task, length)
        loss = loss_of(net, parse_config({"task": task}))
        for size in (7, 64):
            further = SplitMetrics(task, names, length, world.device)
            values = evaluate(net, batches(examples, world, size), Objective(net, loss), world, metrics=further)
            assert values is not None
            found[f"{task} {size}"] = {name: values[name] for name in names}
    assert order == [images(length).labels.tolist()] * (2 if world.is_rank_zero else 0)
    (folder / f"rank_{world.rank}").write_text(json.dumps(found))
    world.leave()


@pytest.mark.parametrize("length", [101, 2])  # uneven shards; with three ranks, an empty one
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_values_are_those_of_scikit_learn(world_size: int, length: int, tmp_path: Path) -> None:
    run_on_ranks(evaluate_on_ranks, tmp_path, length, world_size=world_size)
    ranks = [json.loads(path.read_text()) for path in sorted(tmp_path.iterdir())]
    assert ranks == [ranks[0]] * world_size  # the same on every rank
    for case, found in ranks[0].items():
        assert found == pytest.approx(truth(case.split()[0], length), abs=1e-6), case


class Timid(Net):
    """Predicts every label, by logits that could be probabilities below one half."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).sigmoid() * 0.4 + 0.01


@pytest.mark.parametrize("size", [1, 64])
def test_label_is_predicted_where_its_logit_is_above_zero(size: int, world: World) -> None:
    examples, net = WithTargets("multi_label", 50), Timid()
    loss = loss_of(net, parse_config({"task": "multi_label"}))
    further = SplitMetrics("multi_label", ["recall", "precision", "f1"], 50, CPU)
    found = evaluate(net, batches(examples, world, size), Objective(net, loss), world, metrics=further)
    assert found is not None
    shares = examples.targets.mean(dim=0).double()
    expected = {"recall": (shares > 0).double(), "precision": shares, "f1": 2 * shares / (1 + shares)}
    assert {name: found[name] for name in expected} == pytest.approx(
        {name: float(value.mean()) for name, value in expected.items()}, abs=1e-6
    )


def test_metrics_are_shown_wherever_accuracy_is(tmp_path: Path) -> None:
    run = tmp_path / "r"
    settings = {
        "data": {"name": "support.user_sets:mnist_part"}, "device": "cpu", "train_for": "6 steps", "eval_every": 3,
        "metrics": ["f1", "top3", "auroc"],
    }  # fmt: skip
    train_on_ranks(settings, run, world_size=2)
    lines = [line for line in metrics(run) if "val/loss" in line]
    names = ["f1", "top3", "auroc"]
    assert all({f"val/{name}" for name in names} <= line.keys() for line in lines)
    result = json.loads((run / "result.json").read_text())
    assert {f"{part}/{name}" for part in ("train", "val", "test", "best") for name in names} <= result.keys()

    log = (run / "logs/rank_00000.log").read_text()
    for line in lines:
        said = "  ".join(f"{name} {line[f'val/{name}']:.4g}" for name in names)
        assert said in log
    assert f"), f1 {result['test/f1']:.4g}, top3 {result['test/top3']:.4g}, auroc" in log

    shown = {"val f1": result["best/f1"], "test auroc": result["test/auroc"]}
    header, row = CliRunner().invoke(main, ["runs", "ls", "--in", str(tmp_path)]).output.splitlines()
    assert all(f"  {name}  " in header and f"{value:.4g}" in row for name, value in shown.items())
    plain = json.loads(CliRunner().invoke(main, ["runs", "ls", "--json", "--in", str(tmp_path)]).output)
    assert (plain["val_f1"], plain["test_auroc"]) == (shown["val f1"], shown["test auroc"])
    table = CliRunner().invoke(main, ["runs", "compare", str(run)]).output
    assert all(f"  {name}  " in table for name in ("best val f1", "test auroc"))
    assert f"test/f1 {result['test/f1']:g}" in " ".join(
        CliRunner().invoke(main, ["runs", "show", str(run)]).output.split()
    )
    header = next(evaluations_csv(epochs(RunDir(run), metrics(run)))).decode()
    assert header.endswith("val/loss,val/accuracy,val/f1,val/top3,val/auroc\n")

    done = run_forked([*DIST_TRAIN, "evaluate", "r", "--json"], tmp_path, world_size=3)
    found = json.loads(done.stdout)
    assert {name: found[name] for name in names} == pytest.approx({name: result[f"test/{name}"] for name in names})


# --- what is refused -------------------------------------------------------------------------------------------------


class Flat(Net):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).sum(dim=1)

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        return functional.mse_loss(output, targets.float())


class Own(Net):
    def metrics(self, output: Tensor, targets: Tensor) -> dict[str, float]:
        return {"f1": 1.0}


class Ignoring(Net):
    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(output, targets.where(targets > 0, -100))


@pytest.mark.parametrize(
    ("net", "names", "error", "said"),
    [
        (
            Flat(),
            ["f1"],
            ConfigError,
            r"metrics=f1: with task=classification they need logits \[B, K > 1\] and labels.* but the net returns",
        ),
        (Net(), ["f1", "top5"], ConfigError, r"metrics=top5: the net has 5 classes\. Take a number below 5\."),
        (Own(), ["f1"], UserCodeError, r"returned f1, and metrics=f1 asks torchmetrics.*Give yours another name"),
    ],
)
def test_metric_that_is_not_defined_is_refused(
    net: nn.Module, names: list[str], error: type[Exception], said: str, world: World
) -> None:
    with pytest.raises(error, match=said):
        evaluate(
            net,
            batches(images(10), world, 7),
            Objective(net),
            world,
            metrics=SplitMetrics("classification", names, 10, CPU),
        )


def test_labels_that_are_no_classes_are_refused(world: World) -> None:
    examples, net = images(10), Ignoring()
    examples.labels[3] = -100
    with pytest.raises(
        ConfigError,
        match=r"labels from -100 to \d, and task=classification with an output of 5 has labels from 0 to 4",
    ):
        evaluate(
            net,
            batches(examples, world, 7),
            Objective(net),
            world,
            metrics=SplitMetrics("classification", ["f1"], 10, CPU),
        )


def test_predictions_that_do_not_fit_rank_zero_are_refused() -> None:
    check_gathered("classification", ["f1"], 2_000_000, 1000)
    check_gathered("classification", ["auroc"], 50_000, 1000)
    said = r"metrics=auroc: rank 0 would gather 9\.6 GiB, 1281167 examples x 1002 numbers x 8 bytes.*1 GiB"
    with pytest.raises(ConfigError, match=said):
        check_gathered("classification", ["f1", "auroc"], 1_281_167, 1000)
    with pytest.raises(ConfigError, match=said):
        SplitMetrics("classification", ["auroc"], 1_281_167, CPU).add(
            torch.zeros(2, 1000), torch.zeros(2).long(), torch.arange(2)
        )


def test_states_that_are_no_sums_are_refused() -> None:
    import_torchvision()
    from torchmetrics import MeanAbsoluteError, PearsonCorrCoef

    check_sums("mae", MeanAbsoluteError())
    with pytest.raises(DistTrainError, match=r"metrics=pearson: this torchmetrics keeps its mean_x not as a sum"):
        check_sums("pearson", PearsonCorrCoef())


def test_metric_of_too_many_classes_ends_the_run_before_its_first_step(tmp_path: Path) -> None:
    settings = {"data": {"name": "support.user_sets:mnist_part"}, "device": "cpu", "metrics": ["top10"]}
    with pytest.raises(AssertionError, match=r"metrics=top10: the net has 10 classes"):
        train_on_ranks(settings, tmp_path / "r")
    assert not (tmp_path / "r/metrics.jsonl").exists()
