"""Prepared folders: the examples of the image folder, to the bit, without decoding; errors name the fix."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from dist_train.cli import main
from dist_train.config.data import DataConfig
from dist_train.data.fingerprint import fingerprint_split
from dist_train.data.sets.folder_splits import load_image_folder, split_folders
from dist_train.data.sets.image_set import ImageSet, num_examples
from dist_train.data.sets.preparation import prepare
from dist_train.data.splits import load_splits
from dist_train.errors import ConfigError, DataError
from support.mounts import needs_mounts
from support.processes import DIST_TRAIN
from support.ranks import train_on_ranks
from support.run_files import assert_bit_identical

SIZE = 28


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of pictures that differ in shape; 24 to train on and 6 to test on."""
    numbers = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = numbers.integers(0, 256, (30 + number, 45, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.{'jpg' if number % 2 else 'png'}")
    return tmp_path / "pictures"


@pytest.fixture
def prepared(root: Path) -> Path:
    out = root.parent / "prepared"
    prepare(root, out, SIZE, "pil")
    return out


def settings(root: Path) -> dict[str, Any]:
    return {
        "data": {"name": "image_folder", "root": str(root), "image_size": SIZE},
        "model": {"name": "mlp"}, "global_batch_size": 6, "train_for": "3 epochs",
        "log_every": 1, "final_train_eval": False,
    }  # fmt: skip


@pytest.mark.parametrize("resident", [True, False])
def test_examples_are_those_of_the_folder(resident: bool, root: Path, prepared: Path) -> None:
    for name, expected in load_image_folder(split_folders(root), SIZE, "pil", True).items():
        found: Any = load_image_folder(split_folders(prepared), SIZE, "pil", resident)[name]
        assert isinstance(found, ImageSet) is resident
        assert isinstance(expected, ImageSet)
        assert (found.classes, found.names, num_examples(found)) == (expected.classes, expected.names, len(expected))
        images, labels = zip(*(found[index] for index in range(len(found))), strict=True)
        assert torch.equal(torch.stack(images), expected.images)
        assert torch.equal(torch.tensor(labels), expected.labels)
        assert fingerprint_split(found, seed=0) == fingerprint_split(expected, seed=0)


def test_copies_for_loader_workers_hold_no_pixels(prepared: Path) -> None:
    streamed: Any = load_image_folder(split_folders(prepared), SIZE, "pil", False)["train"]
    copy = pickle.dumps(streamed)
    assert len(copy) < streamed.num_bytes / 4
    assert torch.equal(pickle.loads(copy)[5][0], streamed[5][0])


def test_changed_pixels_stay_in_the_process(prepared: Path) -> None:
    before = (prepared / "train/pixels.npy").read_bytes()
    train: Any = load_image_folder(split_folders(prepared), SIZE, "pil", True)["train"]
    train.images.zero_()
    assert (prepared / "train/pixels.npy").read_bytes() == before


def test_run_goes_on_with_prepared_folder(root: Path, prepared: Path, tmp_path: Path) -> None:
    train_on_ranks(settings(root), tmp_path / "whole", 2)
    train_on_ranks(settings(root), tmp_path / "moved", 2, stop_after=5)
    train_on_ranks(settings(prepared), tmp_path / "moved", 2)
    assert_bit_identical(tmp_path / "moved", tmp_path / "whole")


def test_command(root: Path) -> None:
    out = root.parent / "new/folder"
    done = CliRunner().invoke(main, ["data", "prepare", str(root), str(out), "--image-size=8"])
    assert done.exit_code == 0, done.output
    assert f"data.root={out} data.image_size=8 data.decoder=pil" in done.output
    assert load_image_folder(split_folders(out), 8, "pil")["test"]


def test_what_cannot_be_prepared(root: Path, prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="exists already"):
        prepare(root, prepared, SIZE, "pil")
    with pytest.raises(DataError, match="is a prepared folder"):
        prepare(prepared, tmp_path / "again", SIZE, "pil")
    (root / "test/dog/1.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"test/dog/1\.jpg is not a valid image"):
        prepare(root, tmp_path / "new", SIZE, "pil")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures", "prepared"]
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/new cannot be written: (File exists|Not a directory)"):
        prepare(prepared.parent / "pictures", tmp_path / "file/new", SIZE, "pil")
    with pytest.raises(DataError, match="has no folder train, val or test"):
        prepare(root / "train", tmp_path / "new", SIZE, "pil")


@needs_mounts
def test_full_disk(root: Path, tmp_path: Path) -> None:
    """A write to a mapped file without room would be a bus error, which has no message."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounting = (
        'mount -t tmpfs -o size=48k tmpfs "$1"; "$0" data prepare "$2" "$1/new" --image-size=28; ls -A "$1"; exit $?'
    )
    argv = ["unshare", "-m", "sh", "-uc", mounting, *DIST_TRAIN, str(disk), str(root)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert "No space left on device. 30 images of 3 x 28 x 28 bytes take 0.1 MB" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""  # nothing is left


def test_only_test_split(root: Path, tmp_path: Path) -> None:
    """As a validation set of its own may be."""
    shutil.rmtree(root / "train")
    prepare(root, tmp_path / "new", SIZE, "pil")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["test"]


def test_annotations_beside_classes_are_no_prepared_folder(root: Path) -> None:
    (root / "train/prepared.json").write_text("{}")
    assert num_examples(load_image_folder(split_folders(root), SIZE, "pil")["train"]) == 24


def test_prepared_in_another_way(prepared: Path) -> None:
    for size, decoder in ((32, "pil"), (SIZE, "simplejpeg")):
        with pytest.raises(DataError, match=rf"was prepared with data\.image_size={SIZE} data\.decoder=pil, and this"):
            load_image_folder(split_folders(prepared), size, decoder)  # type: ignore[arg-type]


def test_transforms_need_whole_pictures(prepared: Path) -> None:
    config = DataConfig(name="image_folder", root=prepared, image_size=SIZE, transforms=[{"RandomResizedCrop": {}}])
    with pytest.raises(ConfigError, match="holds only squares of them"):
        load_splits(config, seed=0)


def cut_off(pixels: Path, _images: Path) -> None:
    pixels.write_bytes(pixels.read_bytes()[:-1])


def of_another_type(pixels: Path, _images: Path) -> None:
    np.save(pixels, np.load(pixels).astype(np.float32))


def without_names(_pixels: Path, images: Path) -> None:
    images.write_text(json.dumps(json.loads(images.read_text()) | {"names": None}))


def of_unknown_class(_pixels: Path, images: Path) -> None:
    images.write_text(images.read_text().replace("cat/3", "bird/3"))


def no_json(_pixels: Path, images: Path) -> None:
    images.write_bytes(b"\xff")


@pytest.mark.parametrize("damage", [cut_off, of_another_type, without_names, of_unknown_class, no_json])
def test_damaged_files(damage: Any, prepared: Path) -> None:
    damage(prepared / "train/pixels.npy", prepared / "train/prepared.json")
    with pytest.raises(DataError, match=r"(pixels\.npy|prepared\.json).* [Pp]repare the folder again\."):
        load_image_folder(split_folders(prepared), SIZE, "pil")
