"""Image folders: equal in memory and streamed, the same on every machine; errors name the file."""

from __future__ import annotations

import logging
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.config.data import DataConfig, Normalize
from dist_train.data.sets import folder_splits as module
from dist_train.data.sets.available_memory import available_bytes
from dist_train.data.sets.folder_splits import load_image_folder, split_folders
from dist_train.data.sets.image_folder import ImageFolder
from dist_train.data.sets.image_set import Examples, ImageSet, num_examples
from dist_train.data.splits import load_splits
from dist_train.errors import ConfigError, DataError
from support.pictures import picture


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes with images of several shapes, modes and formats, not created in the order of their names."""
    picture(tmp_path / "train/dog/b.png", (5, 12))
    picture(tmp_path / "train/dog/a.jpg", (40, 30), "L")
    picture(tmp_path / "train/cat/10.png", (8, 8), "RGBA")
    picture(tmp_path / "train/cat/9.bmp", (30, 11))
    picture(tmp_path / "val/dog/x.png")
    picture(tmp_path / "val/cat/x.png")
    picture(tmp_path / "test/cat/x.png")
    picture(tmp_path / "test/dog/x.png")
    (tmp_path / "train/.ipynb_checkpoints").mkdir()
    (tmp_path / "train/dog/.DS_Store").write_bytes(b"hidden")
    (tmp_path / "train/README").write_text("no class")
    return tmp_path


def items(examples: Examples) -> list[tuple[Any, int]]:
    return [examples[index] for index in range(num_examples(examples))]


def load(root: Path, **settings: Any) -> Any:
    return load_splits(DataConfig(name="image_folder", root=root, **({"image_size": 8} | settings)), seed=0)


def test_in_memory_equals_streamed(root: Path) -> None:
    memory, stream = load(root, resident=True), load(root, resident=False)
    for split in ("train", "val", "test"):
        ours, others = getattr(memory, split), getattr(stream, split)
        assert isinstance(ours, ImageSet)
        assert isinstance(others, ImageFolder)
        assert ours.classes == others.classes == ("cat", "dog")
        for (image, label), (other_image, other_label) in zip(items(ours), items(others), strict=True):
            assert image.dtype == torch.uint8
            assert image.shape == (3, 8, 8)
            assert image.equal(other_image)
            assert label == other_label
    assert memory.val_source == stream.val_source == "val/"
    assert memory.val is not memory.test
    for splits in (memory, stream):
        assert (splits.in_channels, splits.image_size, splits.num_classes) == (3, 8, 2)


def test_files_are_sorted_by_name_and_labels_by_class(root: Path) -> None:
    train = ImageFolder(root / "train", 8, "pil")
    assert [path.name for path in train.paths] == ["10.png", "9.bmp", "a.jpg", "b.png"]
    assert train.labels.tolist() == [0, 0, 1, 1]


def test_streamed_set_can_be_pickled(root: Path) -> None:
    train = ImageFolder(root / "train", 8, "pil")
    again = pickle.loads(pickle.dumps(train))
    assert all(a[0].equal(b[0]) and a[1] == b[1] for a, b in zip(items(train), items(again), strict=True))


def test_test_folder_validates_without_val_folder(root: Path) -> None:
    (root / "val").rename(root / "unused")
    splits = load(root)
    assert splits.val is splits.test
    assert splits.val_source == "the test split"
    (root / "test").rename(root / "unused_too")
    splits = load(root)
    assert (splits.val, splits.test, splits.val_source) == (None, None, "none")


@pytest.mark.parametrize("resident", [True, False])
def test_validation_held_out_of_train(resident: bool, root: Path) -> None:
    (root / "val").rename(root / "unused")
    everything, splits = load(root, resident=resident), load(root, resident=resident, val_examples=1)
    assert (num_examples(splits.train), num_examples(splits.val)) == (3, 1)
    seen = {image.numpy().tobytes() for image, _ in items(splits.train) + items(splits.val)}
    assert seen == {image.numpy().tobytes() for image, _ in items(everything.train)}
    assert getattr(splits.train, "yields_pixels", False) is not resident  # normalisation of a streamed subset needs it
    assert splits.num_classes == 2


def test_val_folder_and_val_examples_conflict(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.val_examples=1, but a validation set exists already: val/\."):
        load(root, val_examples=1)


@pytest.mark.parametrize(
    ("free_per_byte", "ranks_per_node", "in_memory"), [(2, 1, True), (1.9, 1, False), (4, 2, True), (3.9, 2, False)]
)
def test_free_memory_decides_by_default(
    free_per_byte: float,
    ranks_per_node: int,
    in_memory: bool,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    needed = 8 * 3 * 8 * 8  # eight images
    monkeypatch.setattr(module, "available_bytes", lambda: int(needed * free_per_byte))
    with caplog.at_level(logging.INFO):
        splits = load_image_folder(split_folders(root), 8, "pil", None, ranks_per_node)
    assert {isinstance(split, ImageSet) for split in splits.values()} == {in_memory}
    assert ("streamed" in caplog.text) is not in_memory


def test_available_memory_is_minimum_of_machine_and_cgroups(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    assert available_bytes(proc, groups) is None
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    assert available_bytes(proc, groups) == 8_192_000
    (proc / "self/cgroup").write_text("0::/job/step\n")
    (groups / "job/step").mkdir(parents=True)
    (groups / "job/step/memory.max").write_text("max\n")
    (groups / "job/memory.max").write_text("5000\n")
    assert available_bytes(proc, groups) == 5000
    (proc / "self/cgroup").write_text("7:cpu,memory:/job\n3:pids:/\n")
    (groups / "memory/job").mkdir(parents=True)
    (groups / "memory/job/memory.limit_in_bytes").write_text("4000\n")
    assert available_bytes(proc, groups) == 4000
    assert (available_bytes() or 0) > 0


# --- errors ------------------------------------------------------------------------------------------------------


def test_missing_train_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"no folder {tmp_path}/train. Set data.root"):
        load(tmp_path)


def test_missing_class_folders_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "train/x.png")
    with pytest.raises(DataError, match="train has no class folders"):
        load(tmp_path)


@pytest.mark.parametrize("split", ["train", "val"])
def test_empty_class_is_refused(split: str, root: Path) -> None:
    for path in (root / split / "dog").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=f"{split}/dog contains no images"):
        load(root)


def test_folder_inside_class_is_refused(root: Path) -> None:
    (root / "train/dog/more").mkdir()
    with pytest.raises(DataError, match="dog/more is a folder"):
        load(root)


def test_links_are_followed(root: Path) -> None:
    (root / "train/cow").symlink_to(root / "train/dog")
    (root / "train/gone").symlink_to(root / "nothing")
    (root / "train/loop").symlink_to(root / "train/loop")
    for name, target in (("0.png", "train/cat/10.png"), ("gone.png", "nothing"), ("loop.png", "train/cat/loop.png")):
        (root / "train/cat" / name).symlink_to(root / target)
    found = ImageFolder(root / "train", 8, "pil")
    cat, dog = ["0.png", "10.png", "9.bmp", "gone.png", "loop.png"], ["a.jpg", "b.png"]
    assert found.classes == ("cat", "cow", "dog")
    assert found.paths == [root / "train" / each / file for each, files in (("cat", cat), ("cow", dog), ("dog", dog))
                           for file in files]  # fmt: skip
    (root / "train/cat/more").symlink_to(root / "train/dog")
    with pytest.raises(DataError, match="more is a folder"):
        ImageFolder(root / "train", 8, "pil")


def test_listing_images_needs_no_stat(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network file system each question is a round trip; a listing already has the answer."""
    asked: list[str] = []
    real = os.stat

    def stat(path: Any, **options: Any) -> os.stat_result:
        asked.append(str(path))
        return real(path, **options)

    monkeypatch.setattr(os, "stat", stat)
    assert not Path(root / "nothing").exists()
    assert asked  # pathlib asks through os.stat
    asked.clear()
    ImageFolder(root / "train", 8, "pil")
    assert asked == []


def test_classes_that_differ_between_splits_are_refused(root: Path) -> None:
    (root / "val/dog").rename(root / "val/wolf")
    with pytest.raises(DataError, match=r"val lacks dog and also has wolf\. All splits"):
        load(root)


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n broken"])
def test_invalid_image_is_named(content: bytes, root: Path) -> None:
    bad = root / "train/dog/notes.png"
    bad.write_bytes(content)
    with pytest.raises(DataError, match=f"{bad} is not a valid image"):
        load(root, resident=True)
    streamed = load(root, resident=False).train
    with pytest.raises(DataError, match=f"{bad} is not a valid image"):
        items(streamed)


def test_truncated_image_is_named(root: Path) -> None:
    path = root / "train/dog/a.jpg"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match=f"{path} is not a valid image"):
        load(root, resident=True)


@pytest.mark.parametrize("resident", [True, False])
def test_normalize_needs_one_number_per_channel(resident: bool, root: Path) -> None:
    with pytest.raises(ConfigError, match=r"normalize has 1 channels, the images of data.name=image_folder have 3"):
        load(root, resident=resident, normalize=Normalize(mean=[0.5], std=[0.5]))
    load(root, resident=resident, normalize=Normalize(mean=[0.5] * 3, std=[0.5] * 3))
