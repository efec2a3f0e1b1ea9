"""A user's data set that is kept in memory: the same results as streamed, or a refusal."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from dist_train.config.batch_plan import BatchPlan
from dist_train.config.data import DataConfig
from dist_train.config.loading import parse_config
from dist_train.data import resident_set as module
from dist_train.data import splits as splits_module
from dist_train.data.batches import Batches, ResidentBatches, StreamingBatches, training_batches
from dist_train.data.evaluation_batches import evaluation_batches
from dist_train.data.resident_set import ResidentSet, make_resident
from dist_train.data.sampler import ShardSampler
from dist_train.data.sets.image_set import Subset, num_examples
from dist_train.data.splits import Splits, load_splits
from dist_train.distributed.world import World
from dist_train.errors import DataError, UserCodeError
from dist_train.inference.evaluate_run import evaluate_run
from support.processes import DIST_TRAIN
from support.ranks import run_forked, train_on_ranks
from support.run_files import assert_bit_identical
from support.trainings import SETTINGS
from support.user_sets import Still, Unlabelled

RUN: dict[str, Any] = {
    "global_batch_size": 12, "per_device_batch_size": 3, "device": "cpu", "step_mode": "eager", "dtype": "float64",
    "train_for": "19 steps", "log_every": 1, "eval_every": "8 steps", "optimizer": {"lr": 1e-2},
}  # fmt: skip
STILL: dict[str, Any] = {
    "data": {"name": "support.user_sets:Still"},
    "model": {"name": "support.user_sets:WithDropout"},
}
CHANGED: dict[str, Any] = {
    "normalize": {"mean": [0.4], "std": [0.3]}, "augment": {"shift": 1, "flip": True, "mixup_alpha": 0.2},
    "sampling": "balanced",
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "floats": STILL,
    "pixels": STILL
    | {"data": STILL["data"] | CHANGED | {"args": {"yields_pixels": True}}, "class_weights": "balanced"},
    "arrays": {
        "data": {
            "name": "support.user_sets:Odd", "num_workers": 2, "val_examples": 7,
            "args": {"length": 60, "form": "array", "draws": [], "folder": "."},  # of a file, which each process opens
        },
        "model": {"name": "support.user_nets:ForOdd", "args": {"in_place": True}},
    },
    "multi_label": {
        "data": {"name": "support.user_sets:TwoDigits", "args": {"length": 96}}, "model": {"name": "mlp"},
        "task": "multi_label",
    },
    "regression": {
        "data": {"name": "support.user_sets:Tilted", "args": {"length": 96}}, "task": "regression",
        "model": {"name": "mlp", "args": {"num_classes": 1}},
    },
}  # fmt: skip


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_training_and_evaluation_are_those_of_streaming(
    case: str, world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = RUN | CASES[case]
    for name, resident in (("resident", True), ("streamed", None)):
        train_on_ranks(settings | {"data": settings["data"] | {"resident": resident}}, tmp_path / name, world_size)
    assert_bit_identical(tmp_path / "resident", tmp_path / "streamed")
    one, other = (final_metrics(tmp_path / name) for name in ("resident", "streamed"))
    assert one == other
    assert one.keys() > {"test/loss", "train/loss"}


@pytest.mark.usefixtures("process_state")
def test_resume_and_evaluation_may_stream_what_was_resident(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(name: str, resident: bool | None, stop_after: int | None = None) -> None:
        data = STILL["data"] | {"resident": resident}
        train_on_ranks(RUN | STILL | {"data": data}, tmp_path / name, stop_after=stop_after)

    train("whole", True)
    train("resumed", None, stop_after=5)
    train("resumed", True, stop_after=13)
    train("resumed", None)
    assert_bit_identical(tmp_path / "resumed", tmp_path / "whole")
    monkeypatch.setattr(splits_module, "make_resident", None)  # a single pass does not pay for it
    found = evaluate_run(tmp_path / "whole", "last", "test")
    assert found is not None
    final = final_metrics(tmp_path / "whole")
    assert {name: final[f"test/{name}"] for name in found.metrics} == found.metrics


def final_metrics(run_dir: Path) -> dict[str, float]:
    result = json.loads((run_dir / "result.json").read_text())
    return {name: value for name, value in result.items() if "/" in name}


def load(name: str = "Still", **settings: Any) -> Splits:
    return load_splits(DataConfig(name=f"support.user_sets:{name}", **settings), seed=0)


def training_batches_of(splits: Splits) -> Batches:
    sampler = ShardSampler(num_examples(splits.train), BatchPlan(4, 1, 1), 0, 0)
    return training_batches(splits.train, sampler, DataConfig(), torch.device("cpu"), 0)


@pytest.mark.parametrize("val_examples", [0, 5])
def test_all_splits_are_in_memory(
    val_examples: int, world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    splits = load(val_examples=val_examples, resident=True)
    assert [type(each) for each in (splits.train, splits.val, splits.test)] == [ResidentSet] * 3
    assert (splits.val is splits.test) is (val_examples == 0)
    assert caplog.text.count("Reading Still into memory") == (3 if val_examples else 2)
    assert isinstance(training_batches_of(splits), ResidentBatches)
    assert isinstance(training_batches_of(load(val_examples=val_examples)), StreamingBatches)
    assert splits.val is not None
    whole = num_examples(splits.val)
    evaluated = evaluation_batches(splits.val, nn.Linear(1, 1), world, parse_config({}))
    monkeypatch.delattr(ResidentSet, "__getitem__")  # no example is taken one by one
    monkeypatch.delattr(Subset, "__getitem__")
    assert sum(map(len, evaluated)) == whole


LENGTH = 70  # more than are read at once


def test_evaluation_has_the_batches_of_streaming(world: World) -> None:
    config = parse_config({"global_batch_size": 1000, "per_device_batch_size": 1000})
    for resident in (True, None):
        examples = load(args={"length": 600}, resident=resident).test
        assert examples is not None
        batches = evaluation_batches(examples, nn.Linear(1, 1), world, config)
        assert [len(batch) for batch in batches] == [256, 256, 88]


class Made(Dataset[Any]):
    """Makes example k of the result of `make(k)`, and counts how often."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make
        self.counts: Counter[int] = Counter()

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Any:
        self.counts[index] += 1
        return self.make(index)


def test_each_example_is_made_twice_and_then_never_again() -> None:
    whole = Made(lambda index: (torch.tensor([index, torch.nan]), index % 2))  # a NaN equals itself
    kept = make_resident(whole, 0, 0, 1)
    assert torch.equal(kept.inputs[:, 0], torch.arange(float(LENGTH)))
    assert kept.targets.tolist() == [index % 2 for index in range(LENGTH)]
    assert kept.targets.dtype == torch.int64
    assert [kept[index][1] for index in range(LENGTH)] == kept.targets.tolist()
    assert whole.counts == dict.fromkeys(range(LENGTH), 2)


numbers = count()
REFUSED: dict[str, tuple[Callable[[int], Any], str]] = {
    "torch": (lambda index: (torch.rand(2) if index == 40 else torch.zeros(2), 0), "Example 40 of Made differs when"),
    "python": (lambda index: (torch.zeros(2), random.random()), "Example 0 of Made differs when it is made again"),
    "numpy": (lambda index: (np.random.rand(2), 0), "Example 0 of Made differs when it is made again"),
    "own generator": (lambda index: (torch.zeros(2), next(numbers)), "Example 0 of Made differs when"),
    "other length each time": (lambda index: (torch.zeros(next(numbers) + 1), 0), "Example 0 of Made differs when"),
    "ragged": (
        lambda index: (torch.zeros(2 + index // 33), 0),
        r"Example 33 of Made is \(float32 \[3\], int\), and those before it are \(float32 \[2\], int\)",
    ),
    "other type": (
        lambda index: (torch.zeros(2), index if index < 4 else 0.5),
        r"Example 4 of Made is \(float32 \[2\], float\), and those before it are \(float32 \[2\], int\)",
    ),
    "mapping": (
        lambda index: ({"image": torch.zeros(2)}, 0),
        r"Example 0 of Made is \({image: float32 \[2\]}, int\), not a pair of tensors or numbers",
    ),
    "strings": (lambda index: (torch.zeros(2), "cat"), r"Example 0 of Made is \(float32 \[2\], str\), not a pair"),
    "nothing": (lambda index: (torch.zeros(2), None), r"Example 0 of Made is \(float32 \[2\], NoneType\), not a pair"),
    "three": (lambda index: (torch.zeros(2), 1, 2), r"Example 0 of Made is \(float32 \[2\], int, int\), not a pair"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_other_sets_are_refused(case: str) -> None:
    make, reason = REFUSED[case]
    fix = r".*\. Remove data\.resident, and the examples are streamed\."
    with pytest.raises(DataError, match=rf"^data\.resident=true: {reason}{fix}$"):
        make_resident(Made(make), 0, 0, 1)


def test_own_collate_is_refused() -> None:
    with pytest.raises(DataError, match=r"^data\.resident=true: Unlabelled has a method collate, which makes whole"):
        make_resident(Unlabelled(True), 0, 0, 1)


def test_error_of_an_example_is_that_of_the_user() -> None:
    with pytest.raises(UserCodeError, match=r"Example 0 of Fails cannot be made: .*no such record"):
        load("Fails", resident=True)


def test_no_rank_trains_on_a_random_set(tmp_path: Path) -> None:
    settings = ["data.name=support.user_sets:Jittered", "data.resident=true", "--run-name=r"]
    done = run_forked([*DIST_TRAIN, "train", *SETTINGS, *settings], tmp_path, 2)
    assert done.returncode == 1  # and no rank waits for another
    assert "data.resident=true: Example 0 of Jittered differs when it is made again" in done.stderr
    assert not (tmp_path / "runs/r").exists()


def test_set_must_fit_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Still(True, 1000)  # of 8 x 8 x 4 + 8 bytes each
    monkeypatch.setattr(module, "available_bytes", lambda: 528_000)
    make_resident(whole, 0, 0, ranks_per_node=2)
    with pytest.raises(
        DataError,
        match=r"Still does not fit in memory: 1000 examples of 264 bytes are 0\.3 MB, on each of 3 ranks per node, "
        r"0\.5 MB free\. Remove data\.resident",
    ):
        make_resident(whole, 0, 0, ranks_per_node=3)


def test_only_a_set_that_may_become_resident_is_suggested(monkeypatch: pytest.MonkeyPatch) -> None:
    size = (101 + 101) * 264
    monkeypatch.setattr(splits_module, "available_bytes", lambda: 2 * size)
    assert load().resident_bytes == size
    for other in (load(resident=True), load(resident=False), load("Jittered"), load("Unlabelled"), load("mnist_part")):
        assert other.resident_bytes is None
    monkeypatch.setattr(splits_module, "available_bytes", lambda: 2 * size - 1)
    assert load().resident_bytes is None


@pytest.mark.parametrize(
    ("slow_s", "net", "epochs", "lines"),
    [(0.005, "WithDropout", 4, 1), (0.005, "WithDropout", 3, 0), (0, "Slow", 4, 0)],
    ids=["noticeable", "too few epochs", "not noticeable"],
)
def test_suggestion_is_one_line_of_the_log(slow_s: float, net: str, epochs: int, lines: int, tmp_path: Path) -> None:
    settings = [
        *SETTINGS, "--run-name=r", "data.name=support.user_sets:Still", f"data.args.slow_s={slow_s}",
        f"model.name=support.user_sets:{net}", f"train_for={epochs} epochs", "global_batch_size=10",
    ]  # fmt: skip
    done = run_forked([*DIST_TRAIN, "train", *settings], tmp_path, 2)
    assert done.returncode == 0, done.stderr
    log = "".join(path.read_text() for path in (tmp_path / "runs/r").rglob("*.log"))
    assert log.count("data.resident=true would make each of them twice") == lines
