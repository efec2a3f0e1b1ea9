"""Data fingerprints at a resume, between ranks and in `evaluate`; rounding differences are ignored."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dist_train.atomic_files import read_json, write_json
from dist_train.checkpoints.manifest import digest, fingerprint
from dist_train.config.data import DataConfig
from dist_train.data import fingerprint as module
from dist_train.data.fingerprint import Difference, differences, fingerprint_split
from dist_train.data.sets.image_folder import ImageFolder
from dist_train.data.sets.image_set import Examples, ImageSet
from dist_train.data.splits import load_splits
from dist_train.errors import DistTrainError
from support.processes import DIST_TRAIN
from support.ranks import run_forked, train_on_ranks
from support.run_files import last_checkpoint, metrics, status
from support.user_sets import Jittered


class Listed(Dataset[Any]):
    """A data set of the given examples."""

    def __init__(self, examples: Iterable[Any], **attributes: Any) -> None:
        self.examples = list(examples)
        self.asked = 0
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        self.asked += 1
        example = self.examples[index]
        return example() if callable(example) else example


def compare(now: Examples, then: Examples) -> list[Difference]:
    """Compare as at a resume, where one fingerprint comes from a file."""
    return differences(
        {"train": fingerprint_split(now, 0)},
        json.loads(json.dumps({"train": fingerprint_split(then, 0)}, allow_nan=False)),
    )


def texts(now: Examples, then: Examples) -> list[str]:
    return [f"{found.now} / {found.then}" for found in compare(now, then)]


# --- sets in memory ----------------------------------------------------------------------------------------------


def images(length: int = 100) -> ImageSet:
    pixels = torch.randint(256, (length, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(pixels, torch.arange(length) % 10, tuple("0123456789"))


def test_every_byte_in_memory_is_compared() -> None:
    assert compare(images(), images()) == []
    assert texts(images(109), images()) == ["109 examples / 100"]
    other = images()
    other.labels[57] = 3
    assert texts(other, images())[0].startswith("labels with checksum ")
    for place in (0, 57 * 16 + 3, 1599):
        other = images()
        other.images.view(-1)[place] ^= 1
        [found] = texts(other, images())
        assert found.startswith("pixels with checksum ")
        assert fingerprint_split(other, 0)["pixels"] in found
        assert fingerprint_split(images(), 0)["pixels"] in found


def test_evenly_spaced_examples_of_large_set_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READ_BYTES", 160)  # a tenth
    changed = []
    for place in range(100):
        other = images()
        other.images[place, 0, 0, 0] ^= 1
        changed += [place] if compare(other, images()) else []
    assert changed == list(range(0, 100, 10))


def test_missing_and_new_splits_are_reported() -> None:
    whole, part = (
        {"train": fingerprint_split(images(), 0), "val": fingerprint_split(images(7), 0)},
        {"train": fingerprint_split(images(), 0)},
    )
    assert differences(part, whole) == [("val", "0 examples", "7")]
    assert differences(whole, part) == [("val", "7 examples", "0")]


# --- user-defined sets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["targets", "labels"])
@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_stored_labels_are_compared(name: str, kind: Any) -> None:
    before, after = [0, 1, 2, 1] * 25, [0, 1, 2, 2] * 25
    others = Listed(range(100), **{name: kind(after)})
    assert texts(others, Listed(range(100), **{name: kind(before)}))[0].startswith("labels")
    assert compare(others, Listed(range(100), **{name: kind(after)})) == []
    assert compare(others, Listed(range(100))) == []  # parts that one side lacks are not compared


@pytest.mark.parametrize("labels", [["a", "b"], None, 7, [[1], [2, 3], [4]], [1.5, 2.5, 3.5], [torch.tensor(1)] * 3])
def test_labels_of_other_types_are_ignored(labels: Any) -> None:
    assert "labels" not in fingerprint_split(Listed(range(3), labels=labels), 0)


class ReadsAll(Listed):
    @property
    def targets(self) -> list[Any]:
        return [self[index] for index in range(len(self))]


def test_computed_labels_are_not_read() -> None:
    computed = ReadsAll(range(1000))
    assert "labels" not in fingerprint_split(computed, 0)
    assert computed.asked == 8


def noise(seed: int, change: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 32, 32, generator=generator) + change * torch.randn(3, 32, 32, generator=generator)


def smooth(seed: int, change: float = 0.0) -> Tensor:
    return torch.nn.functional.interpolate(noise(seed)[None, :, :2, :2], size=32, mode="bilinear")[0] + change


@pytest.mark.parametrize("make", [noise, smooth])
def test_rounding_of_floats_is_ignored(make: Any) -> None:
    before = Listed((make(number), number) for number in range(50))
    assert compare(Listed((make(number, 0.01), number) for number in range(50)), before) == []
    for place in (0, 49):
        other = Listed((make(number + 1000 * (number == place)), number) for number in range(50))
        assert texts(other, before)[0].startswith(f"an example {place} with ")
    scaled = Listed((make(number) * 1.5, number) for number in range(50))
    assert texts(scaled, before)[0].startswith("an example 0 with ")


@pytest.mark.parametrize(
    ("now", "then"),
    [
        ((torch.zeros(3), 1), (torch.zeros(3), 2)),
        ((torch.zeros(3), 1), (torch.zeros(4), 1)),
        ((torch.zeros(3), 1.5), (torch.zeros(3), 1.501)),
        ((np.arange(6, dtype=np.uint8), 0), (np.arange(1, 7, dtype=np.uint8), 0)),
        ({"text": "one", "label": 1}, {"text": "two", "label": 1}),
        ({"image": 1}, {"picture": 1}),
        ([torch.arange(5)], [torch.arange(5).flip(0)]),
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0])),
        (torch.tensor([1 + 2j]), torch.tensor([1 + 3j])),
        (torch.tensor([1, 2], dtype=torch.bfloat16), torch.tensor([1, 3], dtype=torch.bfloat16)),
        ([1, 2], [1, 2, 3]),
    ],
)
def test_different_examples_differ(now: Any, then: Any) -> None:
    assert len(texts(Listed([now]), Listed([then]))) == 1
    assert compare(Listed([now]), Listed([now])) == []
    assert compare(Listed([then]), Listed([then])) == []


@pytest.mark.parametrize(
    "example",
    [
        None,
        object(),
        torch.full((2, 2), torch.inf),
        torch.full((2,), 1e308, dtype=torch.float64),
        torch.empty(0),
        b"\xff",
    ],
)
def test_any_example_can_be_recorded(example: Any) -> None:
    assert compare(Listed([example]), Listed([example])) == []


def test_random_transforms_use_loader_seeds() -> None:
    assert compare(Jittered(train=True), Jittered(train=True)) == []
    assert len(compare(Jittered(train=False), Jittered(train=True))) == 1


def test_set_with_own_generator_is_not_fingerprinted() -> None:
    numbers = count()
    drawn = fingerprint_split(Listed([lambda: next(numbers)] * 9), 0)
    assert drawn == {"count": 9, "unsteady": 0}
    assert differences({"train": drawn}, {"train": fingerprint_split(Listed(range(9)), 0)}) == []
    assert len(differences({"train": drawn}, {"train": fingerprint_split(Listed(range(8)), 0)})) == 1


def test_few_examples_are_read_and_fewer_of_slow_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    large = Listed(range(10**5))
    assert len(fingerprint_split(large, 0)["examples"]) == 4
    assert large.asked == 8
    clock = count()
    monkeypatch.setattr("dist_train.data.fingerprint.time.monotonic", lambda: next(clock))
    slow = Listed(range(10**5))
    assert list(fingerprint_split(slow, 0)["examples"]) == ["0"]
    assert compare(slow, large) == []


def test_failing_example_is_skipped() -> None:
    def fail() -> None:
        raise OSError("gone")

    assert list(fingerprint_split(Listed([0, 1, 2, fail]), 0)["examples"]) == ["0", "1", "2"]


# --- image folders -----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(6):
        path = tmp_path / "train" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return tmp_path / "train"


def test_in_memory_and_streamed_pictures_have_equal_identity(folder: Path) -> None:
    streamed = ImageFolder(folder, 8, "pil")
    memory = streamed.in_memory()
    assert compare(memory, streamed) == compare(streamed, memory) == []
    assert "pixels" not in fingerprint_split(memory, 0)


def test_decoder_rounding_is_ignored(folder: Path) -> None:
    memory = ImageFolder(folder, 8, "pil").in_memory()
    before = fingerprint_split(memory, 0)
    memory.images.copy_((memory.images.int() + torch.randint(-2, 3, memory.images.shape)).clamp(0, 255))
    assert differences({"train": fingerprint_split(memory, 0)}, {"train": before}) == []
    memory.images[5] = memory.images[5].flip(-1)
    assert len(differences({"train": fingerprint_split(memory, 0)}, {"train": before})) == 1


def test_file_names_are_compared(folder: Path) -> None:
    before = fingerprint_split(ImageFolder(folder, 8, "pil"), 0)
    (folder / "b/3.png").rename(folder / "b/4.png")
    [found] = differences({"train": fingerprint_split(ImageFolder(folder, 8, "pil"), 0)}, {"train": before})
    assert found.now.startswith("names with checksum ")


def test_pictures_of_an_older_version_are_told_apart(folder: Path) -> None:
    """It resized them by PIL: their pixels are one level off in places, which rounding may be too."""
    pictures = ImageFolder(folder, 8, "pil")
    for now in (pictures, pictures.in_memory()):
        before = fingerprint_split(now, 0)
        del before["resized_by"]
        [found] = differences({"train": fingerprint_split(now, 0)}, {"train": before})
        assert found.then == "pictures that an older version resized by PIL"


def test_names_and_labels_are_read_without_file_access(folder: Path) -> None:
    """A `stat` of each of a million files on NFS takes minutes."""
    pictures = ImageFolder(folder, 8, "pil")
    before = fingerprint_split(pictures, 0)
    shutil.rmtree(folder)
    after = fingerprint_split(pictures, 0)
    assert {**after, "examples": None} == {**before, "examples": None}
    assert after["examples"] == {}


# --- runs --------------------------------------------------------------------------------------------------------


SETTINGS: dict[str, Any] = {
    "data": {"name": "support.user_sets:OfLength"},
    "model": {"name": "support.user_sets:WithDropout"},
    "global_batch_size": 12,
    "train_for": "2 epochs",
    "eval_every": 0,
    "final_train_eval": False,
    "step_mode": "eager",
}


def test_changed_data_are_refused_at_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_on_ranks(SETTINGS, tmp_path, stop_after=3)
    monkeypatch.setenv("TEST_LENGTH", "109")
    with pytest.raises(AssertionError, match="The train set has 109 examples, but the run began with 101"):
        train_on_ranks(SETTINGS, tmp_path)
    assert status(tmp_path) == "INTERRUPT"  # nothing was written
    monkeypatch.delenv("TEST_LENGTH")
    train_on_ranks(SETTINGS, tmp_path, world_size=2)
    lines = [line for line in metrics(tmp_path) if "audit/unique" in line]
    assert [(line["audit/unique"], line["audit/dropped"]) for line in lines] == [(96, 5), (96, 5)]
    assert "audit/believed" not in lines[0]


def test_ranks_with_different_data_are_refused_before_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_LENGTH_ELSEWHERE", "100")
    with pytest.raises(AssertionError):
        train_on_ranks(SETTINGS, tmp_path, world_size=2)
    message = read_json(tmp_path / "error.json")["message"]
    assert re.match(r"The train set of rank 1 on .* has 100 examples; that of rank 0 has 101\.", message)
    assert not (tmp_path / "metrics.jsonl").exists()
    assert status(tmp_path) == "ERROR"


def remove_data_records(run_dir: Path) -> None:
    """Make the run look like one of an older version, which recorded neither fingerprints nor audit totals."""
    facts = read_json(run_dir / "run.json")
    del facts["data_identity"]
    write_json(run_dir / "run.json", facts)
    checkpoint = last_checkpoint(run_dir)
    state = read_json(checkpoint / "state.json")
    del state["audit"]
    write_json(checkpoint / "state.json", state)
    manifest = read_json(checkpoint / "manifest.json")
    del manifest["sha256"]
    manifest["files"]["state.json"] = fingerprint(checkpoint / "state.json")
    write_json(checkpoint / "manifest.json", {**manifest, "sha256": digest(manifest)})


def test_resume_records_missing_data_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_on_ranks(SETTINGS, tmp_path, stop_after=3)
    record = read_json(tmp_path / "run.json")["data_identity"]
    remove_data_records(tmp_path)
    train_on_ranks(SETTINGS, tmp_path, stop_after=6)
    assert read_json(tmp_path / "run.json")["data_identity"] == record
    train_on_ranks(SETTINGS, tmp_path)
    lines = [line for line in metrics(tmp_path) if "audit/unique" in line]
    assert [(line["audit/unique"], line.get("audit/believed")) for line in lines] == [(60, 36), (96, None)]


def test_evaluate_warns_of_changed_data(tmp_path: Path) -> None:
    train_on_ranks(SETTINGS | {"train_for": "2 steps"}, tmp_path)
    done = run_forked([*DIST_TRAIN, "evaluate", str(tmp_path), "--json"], tmp_path, TEST_LENGTH="109")
    assert json.loads(done.stdout)["seen"] == 109
    assert "The test set has 109 examples, but the run began with 101." in done.stderr


# --- a user's set is not used before loader workers are forked ---------------------------------------------------


def load(name: str, num_workers: int, **settings: Any) -> Any:
    return load_splits(DataConfig(name=f"support.user_sets:{name}", num_workers=num_workers, **settings), seed=0)


@pytest.mark.parametrize("val_examples", [0, 10])
def test_parent_never_opens_data_set(val_examples: int) -> None:
    in_child, in_parent = load("Lazy", 2, val_examples=val_examples), load("Lazy", 0, val_examples=val_examples)
    assert len(in_child.train) == len(in_parent.train) == 50 - val_examples
    assert in_child.input_spec == in_parent.input_spec == {"in_channels": 1, "num_classes": 2, "image_size": 8}
    assert in_child.fingerprints == in_parent.fingerprints
    opened = in_child.train
    while hasattr(opened, "whole"):
        opened = opened.whole
    assert opened.opened_by is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Fails", r"Example 0 of Fails cannot be made: .*user_sets\.py:\d+: ValueError: no such record"),
        ("Empty", "The train set holds no examples"),
        ("Exits", "ended with exit code 3"),
    ],
)
def test_errors_in_child_are_reported(name: str, message: str) -> None:
    with pytest.raises(DistTrainError, match=message):
        load(name, 2)


def test_each_worker_has_its_own_handle(tmp_path: Path) -> None:
    settings = SETTINGS | {"data": {"name": "support.user_sets:Lazy", "num_workers": 2}, "train_for": "1 epochs"}
    train_on_ranks(settings, tmp_path)
    assert [line["audit/unique"] for line in metrics(tmp_path) if "audit/unique" in line] == [48]
