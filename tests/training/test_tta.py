"""Test-time augmentation: the accuracy of the mean output over views, beside all that is evaluated without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_train.config.loading import parse_config
from dist_train.data.evaluation_batches import evaluation_batches
from dist_train.distributed.world import World
from dist_train.errors import ConfigError
from dist_train.models.nets import Mlp
from dist_train.models.tasks.objective import Objective
from dist_train.training.evaluate import evaluate
from support.processes import DIST_TRAIN
from support.ranks import join_group, run_forked, run_on_ranks
from support.user_nets import Scoring
from support.user_sets import mnist_part

LENGTH = 301


def net() -> Mlp:
    """Linear, with weights for real digits: some are right and some wrong."""
    torch.manual_seed(0)
    made = Mlp()
    train = mnist_part(train=True)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    for start in range(0, 960, 96):
        images, labels = train.images[start : start + 96] / 255, train.labels[start : start + 96]
        torch.nn.functional.cross_entropy(made(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return made


def evaluated(tta: str | None, world: World, **settings: Any) -> dict[str, float]:
    config = parse_config({"device": "cpu", "data": {"tta": tta, **settings}, "per_device_batch_size": 64})
    tested = net()
    batches = evaluation_batches(mnist_part(train=False, length=LENGTH), tested, world, config)
    found = evaluate(tested, batches, Objective(tested), world)
    assert found is not None
    return found


def correct_by_hand(kind: str) -> int:
    """Count with the views written out, mirrored by index."""
    images = mnist_part(train=False, length=LENGTH).images / 255
    edge = torch.nn.functional.pad(images, [1, 1, 1, 1], "replicate")
    moved = [edge[:, :, :28, :28], edge[:, :, 2:, 2:]]
    views: list[Tensor] = [images, images[..., range(27, -1, -1)]] if "flip" in kind else [images]
    weights = [1 / len(views)] * len(views)
    if "shift" in kind:
        more = [*moved, *(each[..., range(27, -1, -1)] for each in moved)] if "flip" in kind else moved
        weights = [each / 2 for each in weights] + [0.5 / len(more)] * len(more)
        views += more
    trained = net()
    with torch.no_grad():
        outputs = [weight * trained(view) for weight, view in zip(weights, views, strict=True)]
    labels = mnist_part(train=False, length=LENGTH).labels
    return int((torch.stack(outputs).sum(dim=0).argmax(dim=1) == labels).sum())


@pytest.mark.parametrize("kind", ["flip", "shift", "flip_shift"])
@pytest.mark.parametrize("resident", [True, False], ids=["resident", "streamed"])
def test_accuracy_of_mean_equals_reference_and_changes_nothing_else(kind: str, resident: bool, world: World) -> None:
    plain, found = evaluated(None, world, resident=resident), evaluated(kind, world, resident=resident)
    accuracy = found.pop("accuracy_tta")
    assert found == plain  # to the bit
    assert round(accuracy * LENGTH) == correct_by_hand(kind)
    assert accuracy != found["accuracy"]


def evaluate_on_ranks(folder: Path) -> None:
    join_group("evaluate")
    world = World.join(parse_config({"device": "cpu"}))
    (folder / f"rank_{world.rank}").write_text(json.dumps(evaluated("flip_shift", world)))
    world.leave()


@pytest.mark.parametrize("world_size", [2, 3])
def test_each_example_counts_once(world_size: int, tmp_path: Path) -> None:
    run_on_ranks(evaluate_on_ranks, tmp_path, world_size=world_size)
    found = [json.loads(path.read_text()) for path in sorted(tmp_path.iterdir())]
    assert found == [found[0]] * world_size
    assert found[0]["accuracy_tta"] * LENGTH == pytest.approx(correct_by_hand("flip_shift"), abs=1e-9)


def test_output_without_classes_is_refused(world: World) -> None:
    config = parse_config({"device": "cpu", "data": {"tta": "flip"}})
    scoring = Scoring()
    batches = evaluation_batches(mnist_part(train=False, length=LENGTH), scoring, world, config)
    with pytest.raises(ConfigError, match=r"data\.tta counts the classes of logits \[B, K\] .* Remove data\.tta"):
        evaluate(scoring, batches, Objective(scoring), world)


def test_images_with_their_own_transforms_are_refused(tmp_path: Path) -> None:
    settings = ["data.name=support.user_sets:Jittered", "data.tta=flip", "--fast-dev-run"]
    done = run_forked([*DIST_TRAIN, "train", "-c", "smoke", *settings], tmp_path)
    assert done.returncode == 2
    assert "data.tta does not apply to data.name=support.user_sets:Jittered" in done.stderr
