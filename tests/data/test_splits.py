"""Splits from settings: valid settings for each set, and validation examples held out of train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from dist_train.config.augment import AugmentConfig
from dist_train.config.data import DataConfig, Normalize
from dist_train.data.sets import source as module
from dist_train.data.sets.image_set import ImageSet, num_examples
from dist_train.data.sets.settings_check import check_settings
from dist_train.data.splits import Splits, load_splits
from dist_train.errors import ConfigError


@pytest.fixture
def numbered(monkeypatch: pytest.MonkeyPatch) -> ImageSet:
    """A training set whose images contain their own index; it replaces fashion_mnist."""
    images = torch.arange(200, dtype=torch.uint8).view(200, 1, 1, 1)
    train = ImageSet(images, torch.arange(200) % 10, tuple("0123456789"))
    monkeypatch.setattr(module, "load_named", lambda *_: (train, train.subset(torch.arange(7))))
    return train


def load(seed: int = 0, **settings: Any) -> Splits:
    return load_splits(DataConfig(name="fashion_mnist", **settings), seed)


def ids(examples: Any) -> list[int]:
    assert isinstance(examples, ImageSet)
    return examples.images.flatten().tolist()


def test_test_split_validates_by_default(numbered: ImageSet) -> None:
    splits = load()
    assert splits.train is numbered
    assert splits.val is splits.test
    assert (num_examples(splits.train), splits.val_source) == (200, "the test split")


def test_held_out_examples_follow_seed_and_are_in_no_other_split(numbered: ImageSet) -> None:
    splits = load(seed=1, val_examples=50)
    train, val = ids(splits.train), ids(splits.val)
    assert len(val) == 50
    assert sorted(train + val) == list(range(200))
    assert val not in (list(range(50)), list(range(150, 200)))  # drawn at random, not a slice
    assert ids(splits.test) == list(range(7))
    assert splits.val_source == "50 examples held out of train"
    torch.manual_seed(99)  # the draw uses its own generator
    assert ids(load(seed=1, val_examples=50).val) == val
    assert ids(load(seed=2, val_examples=50).val) != val
    assert isinstance(splits.val, ImageSet)
    assert splits.val.labels.tolist() == [index % 10 for index in val]


@pytest.mark.parametrize(("held_out", "left"), [(200, 0), (250, -50)])
def test_holding_out_everything_is_refused_with_arithmetic(held_out: int, left: int, numbered: ImageSet) -> None:
    with pytest.raises(ConfigError) as caught:
        load(val_examples=held_out)
    assert f"data.val_examples={held_out} of 200 training examples leaves {left} to train on" in str(caught.value)
    assert num_examples(load(val_examples=199).train) == 1


def test_normalize_needs_one_number_per_channel(numbered: ImageSet) -> None:
    load(normalize=Normalize(mean=[0.3], std=[0.3]))
    with pytest.raises(ConfigError, match=r"data\.normalize has 3 channels, the images of .*fashion_mnist have 1"):
        load(normalize=Normalize(mean=[0.3] * 3, std=[0.3] * 3))


@pytest.mark.parametrize(
    ("setting", "effect"), [("shift", "shifts images of"), ("cutout", "blacks out whole images of")]
)
def test_shift_and_cutout_must_be_smaller_than_image(setting: str, effect: str, numbered: ImageSet) -> None:
    side = numbered.images.shape[-1]
    load(augment=AugmentConfig.model_validate({setting: side - 1}))
    with pytest.raises(ConfigError, match=rf"data\.augment\.{setting}={side} {effect} {side} pixels"):
        load(augment=AugmentConfig.model_validate({setting: side}))


def test_saturation_needs_colours(numbered: ImageSet) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.augment\.saturation=0\.4 .* 3 channels, and these have 1\. Remove it"
    ):
        load(augment=AugmentConfig(saturation=0.4))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "fashion-mnist"}, "is not a known data set. Did you mean fashion_mnist? Known: mnist, "),
        ({"name": "cifar"}, "Did you mean cifar10"),
        ({"name": "zzz"}, "data.name=zzz is not a known data set. Known: mnist, fashion_mnist, kmnist, emnist, cifar"),
        ({"name": "my_sets.Mine"}, "For your own, set data.name=package.module:Name."),
        ({"name": "emnist"}, "needs data.split. Set data.split to one of: balanced, byclass, bymerge, digits, letters"),
        ({"name": "emnist", "split": "leters"}, "has no data.split=leters"),
        ({"name": "mnist", "split": "letters"}, "data.split=letters applies to emnist, not to data.name=mnist"),
        ({"name": "image_folder"}, "needs data.image_size"),
        ({"name": "cifar10", "image_size": 32}, "data.image_size=32 applies to image_folder, not to data.name=cifar10"),
        ({"decoder": "simplejpeg"}, "data.decoder=simplejpeg applies to image_folder, not to data.name=mnist"),
        ({"name": "a:b", "image_size": 32}, "data.image_size=32 applies to image_folder, not to data.name=a:b"),
        ({"name": "mnist", "args": {"x": 1}}, "data.args={'x': 1} applies to package.module:Name"),
        ({"bundle": "code", "args": {"x": 1}}, "not to data.bundle"),
        ({"bundle": "code", "name": "cifar10"}, "data.name=cifar10 and data.bundle=code are both set"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_splits(DataConfig.model_validate(settings), seed=0)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bundle": "code"},
        {"bundle": "code", "name": "mnist"},  # as in a run's resolved config
        {"name": "emnist", "split": "letters"},
        {"name": "image_folder", "image_size": 32},
        {"name": "my_sets:Mine", "args": {"x": 1}},
    ],
)
def test_valid_settings(settings: dict[str, Any]) -> None:
    check_settings(DataConfig.model_validate(settings))


# --- bundles -----------------------------------------------------------------------------------------------------


class UserDataset(Dataset[Any]):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((1, 4, 6), float(index)), 0

    def collate(self, batch: list[Any]) -> str:
        return f"{len(batch)} examples"


class UserValDataset(UserDataset): ...


@pytest.fixture
def bundle(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace data.sets.bundle; return its calls and, as the last item, the sets it returns."""
    calls: list[Any] = [{"train": UserDataset(), "val": UserValDataset()}]

    def load_dataset_bundle(path: Path, data_root: Path, *_: object) -> Any:
        calls.insert(0, (path, data_root))
        return calls[-1]

    monkeypatch.setattr(module, "load_dataset_bundle", load_dataset_bundle)
    return calls


def load_bundle(root: Path, **settings: Any) -> Splits:
    return load_splits(DataConfig(bundle=Path("code"), root=root, **settings), seed=0)


def test_bundle_provides_validation_set(bundle: list[Any], tmp_path: Path) -> None:
    splits = load_bundle(tmp_path)
    assert bundle[0] == (Path("code"), tmp_path)
    assert splits.val_source == "UserValDataset"
    assert (splits.train, splits.val, splits.test) == (*bundle[-1].values(), None)
    assert (splits.in_channels, splits.image_size, splits.num_classes) == (1, None, None)  # 4 x 6 is not square
    with pytest.raises(ConfigError, match="a validation set exists already: UserValDataset"):
        load_bundle(tmp_path, val_examples=5)
    with pytest.raises(ConfigError, match=r"data\.normalize does not apply to data\.bundle"):
        load_bundle(tmp_path, normalize=Normalize(mean=[0], std=[1]))


def test_held_out_examples_of_bundle_keep_its_collate(bundle: list[Any], tmp_path: Path) -> None:
    bundle[-1] = {"train": UserDataset()}
    assert load_bundle(tmp_path).val_source == "none"
    splits = load_bundle(tmp_path, val_examples=5)
    assert splits.val is not None
    held = [int(splits.val[index][0][0, 0, 0]) for index in range(num_examples(splits.val))]
    kept = [int(splits.train[index][0][0, 0, 0]) for index in range(num_examples(splits.train))]
    assert len(held) == 5
    assert sorted(held + kept) == list(range(20))
    assert splits.train.collate([1, 2]) == "2 examples"  # type: ignore[union-attr]
    assert splits.val.collate([1]) == "1 examples"  # type: ignore[union-attr]
