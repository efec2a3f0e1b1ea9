"""The bundled MNIST: it is unpacked once and verified on any disk, or fails with one line."""

from __future__ import annotations

import hashlib
import json
import logging
import lzma
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from dist_train.atomic_files import temporary_path
from dist_train.config.data import DataConfig
from dist_train.data.sets import bundled_mnist as module
from dist_train.data.sets import named_sets
from dist_train.data.sets.bundled_mnist import FILES, MARKER_NAME, unpack_mnist
from dist_train.data.sets.image_set import ImageSet
from dist_train.data.splits import load_splits
from dist_train.errors import DataError
from dist_train.torchvision_compat import import_torchvision
from support.mounts import needs_mounts

LABELS = "t10k-labels-idx1-ubyte"
UNPACK = """
import logging, sys
from pathlib import Path
from dist_train.data.sets.bundled_mnist import unpack_mnist
from dist_train.errors import DataError
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
print("ready", flush=True)
sys.stdin.readline()
for root in sys.argv[1:]:
    print("== root")
    try:
        print("done", unpack_mnist(Path(root)))
    except DataError as error:
        print("DataError", error)
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    unpack_mnist(root)
    return root


@pytest.fixture
def root(unpacked: Path, tmp_path: Path) -> Path:
    """A copy of the unpacked root made of hard links: replace files, never write into them."""
    shutil.copytree(unpacked, tmp_path / "data", copy_function=os.link)
    return tmp_path / "data"


@pytest.fixture(scope="module")
def torchvision() -> ModuleType:
    """torchvision, imported before the test: its import sets environment variables."""
    return import_torchvision()


def raw(root: Path) -> Path:
    return root / "MNIST" / "raw"


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def output_for(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[str]]]:
    """The output of UNPACK for roots on unusual disks, by name, from one process in one mount namespace."""
    top = tmp_path_factory.mktemp("mounted")
    for name in ("complete", "without_marker"):
        shutil.copytree(unpacked, top / name, copy_function=os.link)
        (top / name / ".dist_train.lock").unlink()
    (raw(top / "without_marker") / MARKER_NAME).unlink()
    (top / "empty").mkdir()
    (top / "full").mkdir()
    mounting = """
        for name in complete without_marker empty; do
            mount --bind "$1/$name" "$1/$name"
            mount -o remount,ro,bind "$1/$name"
        done
        mount -t tmpfs -o size=20m tmpfs "$1/full"
        exec "$0" -c "$2" "$1/complete" "$1/without_marker" "$1/empty" "$1/full"
    """
    argv = ["unshare", "-m", "sh", "-euc", mounting, sys.executable, str(top), UNPACK]
    output = subprocess.run(argv, input="\n", capture_output=True, text=True, check=True).stdout
    roots = [top / name for name in ("complete", "without_marker", "empty", "full")]
    parts = output.split("== root")[1:]
    return {root.name: (root, part.splitlines()[1:]) for root, part in zip(roots, parts, strict=True)}


def test_files_equal_published_ones(unpacked: Path) -> None:
    assert {name: md5(raw(unpacked) / name) for name in FILES} == {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    }
    assert {path.name for path in raw(unpacked).iterdir()} == {*FILES, MARKER_NAME}  # no partial files


def test_counts_mean_and_std(unpacked: Path) -> None:
    splits = load_splits(DataConfig(root=unpacked), seed=0)
    assert isinstance(splits.train, ImageSet)
    assert isinstance(splits.test, ImageSet)
    assert splits.train.images.shape == (60_000, 1, 28, 28)
    assert splits.test.images.shape == (10_000, 1, 28, 28)
    assert splits.train.labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert splits.test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    levels = splits.train.images.flatten().bincount(minlength=256).double()
    values = levels.new_tensor(range(256)) / 255
    mean = (levels @ values / levels.sum()).item()
    std = (levels @ (values - mean) ** 2 / levels.sum()).sqrt().item()
    assert (round(mean, 4), round(std, 4)) == (0.1307, 0.3081)


def test_torchvision_reads_unpacked_files(unpacked: Path, torchvision: ModuleType) -> None:
    theirs = torchvision.datasets.MNIST(unpacked, train=False)
    ours = load_splits(DataConfig(root=unpacked), seed=0).test
    assert isinstance(ours, ImageSet)
    assert ours.images.squeeze(1).equal(theirs.data)
    assert ours.labels.equal(theirs.targets)


def test_second_start_neither_hashes_nor_writes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> bool:
        raise AssertionError("not needed")

    monkeypatch.setattr(hashlib, "md5", never)
    monkeypatch.setattr(module, "atomic_write", never)
    monkeypatch.setattr(module, "locked", never)
    assert unpack_mnist(root) == raw(root)


def test_existing_files_without_marker_are_hashed_and_used(root: Path) -> None:
    (raw(root) / MARKER_NAME).unlink()
    before = {name: (raw(root) / name).stat().st_ino for name in FILES}
    unpack_mnist(root)
    assert {name: (raw(root) / name).stat().st_ino for name in FILES} == before
    marker = json.loads((raw(root) / MARKER_NAME).read_text())
    assert {name: size for name, (size, _) in marker.items()} == {name: file.size for name, file in FILES.items()}


@pytest.mark.parametrize("marker", ["", "[]", '{"t10k-labels-idx1-ubyte": 7}'])
def test_damaged_marker_is_rewritten(marker: str, root: Path) -> None:
    replace(raw(root) / MARKER_NAME, marker.encode())
    unpack_mnist(root)
    assert set(json.loads((raw(root) / MARKER_NAME).read_text())) == set(FILES)


@pytest.mark.parametrize("content", [b"short", b"\0" * FILES[LABELS].size], ids=["truncated", "same size"])
def test_damaged_file_is_restored_with_warning(content: bytes, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    replace(raw(root) / LABELS, content)
    unpack_mnist(root)
    assert md5(raw(root) / LABELS) == FILES[LABELS].md5
    assert (raw(root) / f"{LABELS}.damaged").read_bytes() == content
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert str(raw(root) / LABELS) in warnings[0]


def test_leftovers_of_killed_process_are_removed(root: Path) -> None:
    (raw(root) / LABELS).unlink()
    leftover = temporary_path(raw(root) / LABELS)
    leftover.write_bytes(b"half")
    unpack_mnist(root)
    assert not leftover.exists()
    assert md5(raw(root) / LABELS) == FILES[LABELS].md5


@pytest.mark.parametrize("damage", ["cut", "other", "missing"])
def test_damaged_package_file_is_not_unpacked(
    damage: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (raw(root) / LABELS).unlink()
    packed = (module._PACKED / f"{LABELS}.xz").read_bytes()
    contents = {"cut": packed[:-40], "other": lzma.compress(b"other")}
    if damage in contents:
        (tmp_path / f"{LABELS}.xz").write_bytes(contents[damage])
    monkeypatch.setattr(module, "_PACKED", tmp_path)
    with pytest.raises(DataError, match=rf"{LABELS}\.xz of the installed package"):
        unpack_mnist(root)
    assert {path.name for path in raw(root).iterdir()} == {*FILES, MARKER_NAME} - {LABELS}


def test_concurrent_processes_unpack_once(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", UNPACK, str(tmp_path)]
    both = [
        subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    for process in both:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    output = [process.communicate()[0] for process in both]
    assert [text.splitlines()[-1] for text in output] == [f"done {raw(tmp_path)}"] * 2, output
    assert "".join(output).count("Unpacked") == len(FILES)
    assert {name: md5(raw(tmp_path) / name) for name in FILES} == {name: file.md5 for name, file in FILES.items()}


@needs_mounts
@pytest.mark.parametrize("name", ["complete", "without_marker"])
def test_read_only_root_with_files_works(name: str, output_for: dict[str, tuple[Path, list[str]]]) -> None:
    root, lines = output_for[name]
    assert lines == [f"done {raw(root)}"]


@needs_mounts
def test_read_only_root_without_files_is_one_line_error(output_for: dict[str, tuple[Path, list[str]]]) -> None:
    root, lines = output_for["empty"]
    assert len(lines) == 1
    assert lines[0].startswith(f"DataError Cannot write to {root}: Read-only file system")
    assert "data.root or DIST_TRAIN_DATA_DIR" in lines[0]


@needs_mounts
def test_full_disk_is_one_line_error_without_partial_files(
    output_for: dict[str, tuple[Path, list[str]]],
) -> None:
    root, lines = output_for["full"]
    assert len(lines) == 1
    assert lines[0].startswith(f"DataError Cannot write to {root}: No space left on device (55.0 MB to write, ")
    free_mb = float(lines[0].split(" MB to write, ")[1].split(" MB free")[0])
    assert free_mb > 20  # the partial file is removed


def test_unwritable_default_root_reads_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(root: Path) -> Path:
        if root == tmp_path / "cache/dist_train":
            raise DataError(f"Cannot write to {root}")
        return unpack_mnist(root)

    monkeypatch.setattr(named_sets, "unpack_mnist", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("DIST_TRAIN_DATA_DIR", str(tmp_path / "cache/dist_train"))
    with pytest.raises(DataError, match="Cannot write to"):  # the folder was chosen explicitly
        load_splits(DataConfig(), seed=0)
    monkeypatch.delenv("DIST_TRAIN_DATA_DIR")
    found = load_splits(DataConfig(), seed=0).train
    assert isinstance(found, ImageSet)
    assert len(found) == 60_000
    assert list(tmp_path.iterdir()) == []
