"""A validation set of its own: another folder, another loader, or both."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dist_train.config.data import DataConfig
from dist_train.data.sets import source as module
from dist_train.data.sets.image_set import ImageSet, num_examples
from dist_train.data.splits import Splits, check_data_exists, load_splits
from dist_train.errors import ConfigError, DataError, UserCodeError
from support.ranks import train_on_ranks
from support.run_files import metrics, status

# Its classes read the numbers in one file of their folder, and so give examples that say where they come from.
LOADER = """
from pathlib import Path
import torch
from torch.utils.data import Dataset, default_collate

class UserDataset(Dataset):
    file, width, classes = "train", 4, ["even", "odd"]

    def __init__(self, data_path):
        self.values = [int(word) for word in (Path(data_path) / self.file).read_text().split()]

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return torch.full((self.width,), float(self.values[index])), self.values[index] % 2

    def collate(self, batch):
        return default_collate(batch)
"""
VAL = """
class UserValDataset(UserDataset):
    file = "val"
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """Folders with bundles: one that also has a validation set, two that have one set."""
    for name, text in (
        ("both", LOADER + VAL), ("train", LOADER), ("val", LOADER.replace('"train"', '"val"')),
        ("only_val", (LOADER + VAL).replace("UserDataset", "Base")),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "bks_dataset.py").write_text(text)
    return tmp_path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Folders of numbers, each for one purpose: reading them for the other fails."""
    for name, file, numbers in (("t", "train", range(10)), ("v", "val", range(20, 23)), ("w", "train", range(30, 32))):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(" ".join(map(str, numbers)))
    return tmp_path


def load(**settings: Any) -> Splits:
    config = DataConfig.model_validate(settings)
    check_data_exists(config)
    return load_splits(config, seed=0)


def values(examples: Any) -> list[int]:
    return [int(examples[index][0].flatten()[0]) for index in range(num_examples(examples))]


# --- which examples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 1], ids=["here", "in a child"])
@pytest.mark.parametrize(
    ("bundle", "settings", "first", "name"),
    [
        ("both", {"val_root": "v"}, 20, "UserValDataset (data.val_root=v)"),
        ("train", {"val_root": "w"}, 30, "UserDataset (data.val_root=w)"),
        ("both", {"val_bundle": "only_val", "val_root": "v"}, 20, "UserValDataset (data.val_bundle=only_val data.val"),
        ("train", {"val_bundle": "val", "val_root": "v"}, 20, "UserDataset (data.val_bundle=val data.val_root=v)"),
    ],
)
def test_loaders_and_folders_of_bundles(
    bundle: str, settings: dict[str, str], first: int, name: str, num_workers: int, code: Path, data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(data)  # paths are taken from the current folder, as those of the training set
    splits = load(bundle=bundle, root="t", **settings, num_workers=num_workers)
    assert values(splits.train) == list(range(10))
    assert values(splits.val)[0] == first
    assert splits.fingerprints["val"]["count"] == num_examples(splits.val or splits.train) < 10
    assert splits.test is None
    assert splits.val_source.startswith(name)


def test_another_loader_reads_the_folder_of_the_training_set(code: Path, data: Path) -> None:
    shutil.copy(data / "v/val", data / "t/val")
    splits = load(bundle=code / "train", root=data / "t", val_bundle=code / "val")
    assert (values(splits.train), values(splits.val)) == ([*range(10)], [20, 21, 22])


def pictures(folder: Path, **classes: int) -> None:
    for name, gray in classes.items():
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (4, 4), (gray,) * 3).save(folder / name / "x.png")


@pytest.mark.parametrize("folders", [["val", "test", "train"], ["test", "train"], ["train"]], ids=" ".join)
@pytest.mark.parametrize("resident", [True, False])
def test_first_of_val_test_train_of_an_image_folder(folders: list[str], resident: bool, tmp_path: Path) -> None:
    for number, split in enumerate(("train", "val", "test")):
        pictures(tmp_path / "root" / split, cat=number, dog=number)
    for number, split in enumerate(folders):
        pictures(tmp_path / "own" / split, cat=100 + number, dog=100 + number)
    root, own = tmp_path / "root", tmp_path / "own"
    splits = load(name="image_folder", image_size=4, root=root, val_root=own, resident=resident)
    assert (values(splits.train), values(splits.val), values(splits.test)) == ([0, 0], [100, 100], [2, 2])
    assert splits.val_source == f"{folders[0]}/ (data.val_root={own})"
    assert set(splits.fingerprints) == {"train", "val", "test"}


def test_test_split_of_a_named_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_named(_name: str, root: Path, _split: str | None) -> tuple[ImageSet, ImageSet]:
        start = {"here": 0, "there": 100}[root.name]
        images = torch.arange(start, start + 20, dtype=torch.uint8).view(20, 1, 1, 1)
        both = ImageSet(images, torch.arange(20) % 10, tuple("0123456789"))
        return both.subset(torch.arange(15)), both.subset(torch.arange(15, 20))

    monkeypatch.setattr(module, "load_named", load_named)
    splits = load(name="kmnist", root="here", val_root="there")
    assert (values(splits.val), values(splits.test)) == ([*range(115, 120)], [*range(15, 20)])
    assert splits.val_source == "the test split (data.val_root=there)"


SETS = """
import torch
from pathlib import Path

class ByFolder:
    def __init__(self, root, train):
        self.numbers = [int(word) for word in (Path(root) / ("train" if train else "val")).read_text().split()]
    def __len__(self): return len(self.numbers)
    def __getitem__(self, index): return torch.tensor([float(self.numbers[index])]), 0

class Fixed:
    def __len__(self): return 5
    def __getitem__(self, index): return torch.zeros(1), 0
"""


def test_class_of_the_user_gets_the_folder(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (data / "sets_with_folders.py").write_text(SETS)
    monkeypatch.syspath_prepend(data)
    shutil.copy(data / "v/val", data / "t/val")
    splits = load(name="sets_with_folders:ByFolder", root=data / "t", val_root=data / "v")
    assert (values(splits.train), values(splits.val)) == ([*range(10)], [20, 21, 22])
    with pytest.raises(ConfigError, match=r"data\.val_root=v is passed on .*:Fixed has no argument root\. Change"):
        load(name="sets_with_folders:Fixed", val_root="v")
    with pytest.raises(ConfigError, match=r"data\.args\.root=/.*/t sets it\. Change that,"):
        load(name="sets_with_folders:ByFolder", args={"root": str(data / "t")}, val_root=data / "v")


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"val_root": "v", "val_examples": 5},
            r"data\.val_examples=5 holds out .* data\.val_root=v is .* own\. Set data",
        ),
        ({"bundle": "both", "val_bundle": "val", "val_examples": 5}, r"val_examples=5 .* data\.val_bundle=val is"),
        ({"val_bundle": "val"}, r"data\.val_bundle=val goes with a data\.bundle, .* data\.name=mnist\."),
        (
            {"bundle": "train", "root": "t", "val_bundle": "nowhere"},
            r"^data\.val_bundle=nowhere: no such file or folder",
        ),
        ({"bundle": "train", "root": "t", "val_root": "v"}, r"UserDataset .* data_path='/.*/v' failed: .*FileNotFound"),
        ({"bundle": "train", "root": "t", "val_root": "file"}, r"^data\.val_root=/.*/file cannot be created"),
        (
            {"bundle": "train", "root": "t", "val_root": "t"},
            r"^data\.val_root=t names the training set itself, UserDataset",
        ),
        (
            {"bundle": "train", "root": "t", "val_root": "alias", "val_bundle": "./train/"},
            r"^data\.val_bundle=\S+ data\.val_root=alias names the training set itself, UserDataset",
        ),
        (
            {"name": "image_folder", "image_size": 8, "root": "pictures", "val_root": "t"},
            r"^There is no folder /.*/t/val\. Set data\.val_root to the folder that holds val/CLASS",
        ),
    ],
)
def test_settings_that_do_not_fit(
    settings: dict[str, Any], message: str, code: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data)
    pictures(data / "pictures/train", cat=0)
    (data / "file").touch()
    (data / "alias").symlink_to("t")
    with pytest.raises((ConfigError, DataError, UserCodeError), match=message):
        load(**settings)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("4,", "5,", r"inputs float32 \[5\], the training set float32 \[4\]\."),
        ('["even", "odd"]', '["odd", "even"]', "has odd as class 0, the training set even"),
        ('["even", "odd"]', '["even", "odd", "none"]', "has 3 classes, the training set 2"),
        ('["even", "odd"]', "None", ""),  # not every set says
        ("self.width,", "int(self.values[index]),", r"inputs float32 \[20\], the training set float32 \[4\]\."),
    ],
)
@pytest.mark.parametrize("num_workers", [0, 1], ids=["here", "in a child"])
def test_inputs_and_classes_agree_with_the_training_set(
    old: str, new: str, message: str, num_workers: int, code: Path, data: Path
) -> None:
    file = code / "val/bks_dataset.py"
    file.write_text(file.read_text().replace(old, new))
    assert new in file.read_text()
    settings = {"bundle": code / "train", "root": data / "t", "val_bundle": code / "val", "val_root": data / "v"}
    if not message:
        assert load(**settings).num_classes == 2
        return
    with pytest.raises(DataError, match=message) as caught:
        load(**settings, num_workers=num_workers)
    assert f"data.val_bundle={code}/val data.val_root={data}/v" in str(caught.value)


def test_inputs_that_differ_in_size_among_themselves_may_differ(code: Path, data: Path) -> None:
    for name in ("train", "val"):
        file = code / name / "bks_dataset.py"
        file.write_text(file.read_text().replace("self.width,", "1 + self.values[index],"))
    splits = load(bundle=code / "train", root=data / "t", val_bundle=code / "val", val_root=data / "v")
    assert values(splits.val) == [20, 21, 22]


# --- in a run ------------------------------------------------------------------------------------------------------


def test_run_evaluates_on_it_and_notices_that_it_changed(code: Path, data: Path) -> None:
    settings = {
        "data": {
            "bundle": str(code / "train"), "root": str(data / "t"), "val_root": str(data / "v"),
            "val_bundle": str(code / "val"),
        },
        "model": {"name": "torch.nn:Linear", "args": {"in_features": 4, "out_features": 2}},
        "global_batch_size": 2, "train_for": "4 steps", "eval_every": "4 steps",
    }  # fmt: skip
    train_on_ranks(settings, data / "run", world_size=2, stop_after=2)
    shutil.move(data / "v", data / "moved")  # the folder may move, as that of the training set
    settings["data"] = settings["data"] | {"val_root": str(data / "moved")}  # type: ignore[operator]
    numbers = (data / "moved/val").read_text()
    (data / "moved/val").write_text(numbers.replace("21", "23"))
    with pytest.raises(AssertionError, match=r"The val set has an example 1 with .* but the run began with"):
        train_on_ranks(settings, data / "run")
    (data / "moved/val").write_text(numbers)
    train_on_ranks(settings, data / "run")
    assert status(data / "run") == "FINISHED"
    assert [line["val/seen"] for line in metrics(data / "run") if "val/seen" in line] == [3]
