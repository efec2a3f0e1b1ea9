"""User-defined data sets: called as torchvision's, and refused if they cannot be sharded exactly."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from dist_train.config.data import DataConfig, Normalize
from dist_train.data.sets.bundled_mnist import unpack_mnist
from dist_train.data.sets.image_set import ImageSet, num_examples
from dist_train.data.splits import Splits, load_splits
from dist_train.errors import ConfigError, DataError, UserCodeError
from dist_train.torchvision_compat import import_torchvision


class Recorded(Dataset[Any]):
    """Ten images of 3 x 5 x 5 that record the call's arguments."""

    def __init__(self, **called_with: Any) -> None:
        self.called_with = called_with

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((3, 5, 5), float(index)), index % 4


class TrainFlag(Recorded):
    classes = ["a", "b", "c", "d"]

    def __init__(self, root: str, train: bool = True, level: int = 0) -> None:
        super().__init__(root=root, train=train, level=level)


class Derived(TrainFlag):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class SplitName(Recorded):
    num_classes = 7

    def __init__(self, root: str, split: str = "train") -> None:
        super().__init__(root=root, split=split)


class ThreeSplits(SplitName):
    splits = ("train", "val", "test", "unlabeled")


class TrainAndVal(SplitName):
    splits = {"train": "a file", "val": "another"}


class NoTrain(SplitName):
    splits = ("extra",)


class FaultyTest(Recorded):
    def __init__(self, split: str) -> None:
        if split == "test":
            raise ValueError("a real mistake")
        super().__init__(split=split)


class LikeEmnist(Recorded):
    def __init__(self, root: str, split: str, train: bool = True) -> None:
        super().__init__(root=root, split=split, train=train)


def plain(count: int = 3) -> ImageSet:
    return ImageSet(torch.zeros(count, 2, 6, 6, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64), ("only",))


def with_everything(**options: Any) -> Recorded:
    return Recorded(**options)


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


def hidden_stream() -> Stream:
    return Stream()


class NoLength(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index


class Empty(Recorded):
    def __len__(self) -> int:
        return 0


class BadFirst(Recorded):
    def __getitem__(self, index: int) -> Any:
        raise RuntimeError("no such image")


class NoImages(Recorded):
    def __getitem__(self, index: int) -> Any:
        return "text", index


class Nothing: ...


NUMBER = 7


@pytest.fixture(autouse=True)
def my_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this file's classes importable as `my_sets`."""
    module = ModuleType("my_sets")
    vars(module).update({name: value for name, value in globals().items() if not name.startswith("__")})
    monkeypatch.setitem(sys.modules, "my_sets", module)


@pytest.fixture(scope="module")
def torchvision() -> ModuleType:
    """torchvision, imported before the test: its import sets environment variables."""
    return import_torchvision()


def load(name: str, root: Path = Path("/nowhere"), **settings: Any) -> Splits:
    return load_splits(DataConfig(name=f"my_sets:{name}", root=root, **settings), seed=0)


def calls(splits: Splits) -> list[Any]:
    return [getattr(split, "called_with", None) for split in (splits.train, splits.val, splits.test)]


@pytest.mark.parametrize("name", ["TrainFlag", "Derived"])
def test_train_flag_selects_split(name: str) -> None:
    splits = load(name, args={"level": 3})
    test = {"root": "/nowhere", "train": False, "level": 3}
    assert calls(splits) == [test | {"train": True}, test, test]
    assert splits.val is splits.test
    assert splits.val_source == "the test split"
    assert (splits.in_channels, splits.image_size, splits.num_classes) == (3, 5, 4)


def test_split_argument_selects_split() -> None:
    splits = load("SplitName")
    assert [call["split"] for call in calls(splits)] == ["train", "test", "test"]
    assert splits.val is splits.test
    assert splits.num_classes == 7


def test_splits_attribute_selects_splits() -> None:
    splits = load("ThreeSplits")
    assert [call["split"] for call in calls(splits)] == ["train", "val", "test"]
    assert splits.val_source == "my_sets:ThreeSplits(split='val')"
    splits = load("TrainAndVal")
    assert [call and call["split"] for call in calls(splits)] == ["train", "val", None]
    with pytest.raises(ConfigError, match=r"my_sets:NoTrain\.splits is extra\. One of them must be train"):
        load("NoTrain")


def test_failing_split_is_not_treated_as_absent() -> None:
    with pytest.raises(UserCodeError) as caught:
        load("FaultyTest")
    assert "my_sets:FaultyTest(split='test') failed" in str(caught.value)
    assert "ValueError: a real mistake" in str(caught.value)
    assert "`splits`" in str(caught.value)


def test_train_takes_precedence_over_split_and_args_over_both() -> None:
    splits = load("LikeEmnist", args={"split": "letters"})
    assert [(call["split"], call["train"]) for call in calls(splits)] == [
        ("letters", True),
        ("letters", False),
        ("letters", False),
    ]
    splits = load("TrainFlag", args={"train": False})
    assert calls(splits) == [{"root": "/nowhere", "train": False, "level": 0}, None, None]


def test_plain_function_has_only_train() -> None:
    splits = load("plain", args={"count": 5})
    assert isinstance(splits.train, ImageSet)
    assert len(splits.train) == 5
    assert (splits.val, splits.test, splits.val_source) == (None, None, "none")
    assert (splits.in_channels, splits.image_size, splits.num_classes) == (2, 6, 1)
    assert num_examples(load("plain", val_examples=1).train) == 2


def test_kwargs_accept_any_argument() -> None:
    assert calls(load("with_everything", args={"what": [1, "x"]})) == [{"what": [1, "x"]}, None, None]


def test_downloads_hold_a_lock(tmp_path: Path) -> None:
    load("with_everything", tmp_path, args={"download": False})
    assert not list(tmp_path.iterdir())
    load("with_everything", tmp_path, args={"download": True})
    assert [path.name for path in tmp_path.iterdir()] == [".dist_train.lock"]


def test_unknown_argument_is_named_with_known_ones() -> None:
    message = r"data\.args\.levle\. Did you mean data\.args\.level\? It takes: root, train, level\."
    with pytest.raises(ConfigError, match=message):
        load("Derived", args={"levle": 3})


@pytest.mark.parametrize("name", ["Stream", "hidden_stream"])
def test_iterable_data_set_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"my_sets:{name}.* is an IterableDataset; dist_train needs a map-style"):
        load(name)


def test_objects_that_are_not_data_sets_are_refused() -> None:
    with pytest.raises(ConfigError, match="is a NoLength without __len__;"):
        load("NoLength")
    with pytest.raises(ConfigError, match="without __len__ and __getitem__"):
        load("Nothing")
    with pytest.raises(ConfigError, match=r"data\.name=my_sets:NUMBER is of type int"):
        load("NUMBER")
    with pytest.raises(DataError, match="holds no examples"):
        load("Empty")


def test_first_example_defines_shape() -> None:
    with pytest.raises(
        UserCodeError,
        match=r"Example 0 of BadFirst cannot be made: .*test_user_sets\.py:\d+: RuntimeError: no such image",
    ):
        _ = load("BadFirst").in_channels
    splits = load("NoImages")
    assert (splits.in_channels, splits.image_size, splits.num_classes) == (None, None, None)


def test_normalize_requires_pixels() -> None:
    two = Normalize(mean=[0.5, 0.5], std=[1, 1])
    with pytest.raises(ConfigError, match=r"data\.normalize does not apply to data\.name=my_sets:TrainFlag, which has"):
        load("TrainFlag", normalize=two)
    load("plain", normalize=two)


@pytest.mark.usefixtures("torchvision")
def test_torchvision_classes_by_import_path(tmp_path: Path) -> None:
    unpack_mnist(tmp_path)
    splits = load_splits(DataConfig(name="torchvision.datasets:MNIST", root=tmp_path), seed=0)
    assert splits.val is not None
    assert (num_examples(splits.train), num_examples(splits.val)) == (60_000, 10_000)
    assert splits.num_classes == 10
