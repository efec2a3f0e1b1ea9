"""Named data sets: files are read as torchvision reads them; failed downloads report the fix."""

from __future__ import annotations

import gzip
import hashlib
import io
import logging
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_train.config.data import DataConfig
from dist_train.data.sets.catalog import EMNIST_CLASSES, SETS, available_sets
from dist_train.data.sets.download import fetch
from dist_train.data.sets.image_set import ImageSet
from dist_train.data.sets.named_sets import load_named
from dist_train.data.splits import load_splits
from dist_train.errors import ConfigError, DataError
from dist_train.torchvision_compat import import_torchvision
from support.processes import DIST_TRAIN
from support.ranks import run_forked

NUMBERS = np.random.default_rng(0)
IDX_SETS = [
    ("fashion_mnist", None),
    ("kmnist", None),
    ("emnist", "letters"),
    ("emnist", "balanced"),
    ("emnist", "mnist"),
]


@pytest.fixture(scope="module")
def theirs() -> Any:
    """torchvision.datasets, imported before the test: the import sets environment variables."""
    return import_torchvision().datasets


@pytest.fixture(scope="module")
def savemat() -> Any:
    """scipy's, imported before the test for the same reason."""
    return pytest.importorskip("scipy.io").savemat


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A local port that refuses connections: bound, but not listening."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the local address that serves it."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    folder = tmp_path / "mirror"
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def idx_bytes(array: np.ndarray[Any, Any]) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx_set(name: str, root: Path, split: str | None, num_classes: int) -> None:
    for number, path in enumerate(SETS[name].files(root, split)):
        path.parent.mkdir(parents=True, exist_ok=True)
        count = 12 if number < 2 else 5
        shape = (count, 6, 7) if number % 2 == 0 else (count,)
        path.write_bytes(idx_bytes(NUMBERS.integers(0, 256 if number % 2 == 0 else num_classes, shape, dtype=np.uint8)))


def write_cifar(name: str, root: Path, theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write small batches in the real format; torchvision gets their MD5 sums instead of the real ones."""
    kind = getattr(theirs, SETS[name].class_name)
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    key = "labels" if name == "cifar10" else "fine_labels"

    def write_pickle(filename: str, content: dict[str, Any]) -> str:
        (folder / filename).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / filename).read_bytes()).hexdigest()

    for attribute in ("train_list", "test_list"):
        sums = []
        for filename, _ in getattr(kind, attribute):
            pixels = NUMBERS.integers(0, 256, (4, 3072), dtype=np.uint8)
            sums.append([filename, write_pickle(filename, {"data": pixels, key: [3, 1, 0, 2]})])
        monkeypatch.setattr(kind, attribute, sums)
    names = {kind.meta["key"]: ["airplane", "bird", "cat", "deer"]}
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": write_pickle(kind.meta["filename"], names)})


def write_svhn(root: Path, theirs: Any, savemat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = dict(theirs.SVHN.split_list)
    for half in ("train", "test"):
        url, filename, _ = listed[half]
        labels = np.array([[10], [1], [9], [10]], dtype=np.uint8)  # the files label zeros as 10
        savemat(root / filename, {"X": NUMBERS.integers(0, 256, (32, 32, 3, 4), dtype=np.uint8), "y": labels})
        listed[half] = [url, filename, hashlib.md5((root / filename).read_bytes()).hexdigest()]
    monkeypatch.setattr(theirs.SVHN, "split_list", listed)


def assert_same_images(ours: ImageSet, dataset: Any) -> None:
    """Assert that each example equals that of torchvision's class, a PIL image."""
    assert len(ours) == len(dataset)
    for index in range(len(ours)):
        picture, label = dataset[index]
        pixels = torch.from_numpy(np.array(picture))  # [H, W] or [H, W, C]
        expected = pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        assert ours[index][0].equal(expected)
        assert ours[index][1] == label


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(("name", "split"), IDX_SETS)
def test_idx_sets_equal_torchvision(name: str, split: str | None, tmp_path: Path, theirs: Any) -> None:
    arguments = {"split": split} if split else {}
    write_idx_set(name, tmp_path, split, num_classes=10)
    splits = load_splits(DataConfig(name=name, root=tmp_path, split=split), seed=0)
    assert isinstance(splits.train, ImageSet)
    assert isinstance(splits.test, ImageSet)
    assert splits.val is splits.test
    assert splits.val_source == "the test split"
    build = getattr(theirs, SETS[name].class_name)
    assert_same_images(splits.train, build(tmp_path, train=True, **arguments))
    assert_same_images(splits.test, build(tmp_path, train=False, **arguments))
    assert list(splits.train.classes) == build(tmp_path, **arguments).classes


def test_emnist_class_names_and_splits_equal_torchvision(theirs: Any) -> None:
    assert {split: list(names) for split, names in EMNIST_CLASSES.items()} == theirs.EMNIST.classes_split_dict
    assert set(EMNIST_CLASSES) == set(theirs.EMNIST.splits)


def test_file_names_equal_torchvision(theirs: Any) -> None:
    for name in ("mnist", "fashion_mnist", "kmnist"):
        kind = getattr(theirs, SETS[name].class_name)
        assert [path.name for path in SETS[name].files(Path())] == [
            filename.removesuffix(".gz") for filename, _ in kind.resources
        ]
    for name in ("cifar10", "cifar100"):
        kind = getattr(theirs, SETS[name].class_name)
        parts = [*kind.train_list, *kind.test_list, [kind.meta["filename"]]]
        assert SETS[name].files(Path()) == [Path(kind.base_folder, filename) for filename, *_ in parts]
        assert SETS[name].archives == (kind.filename,)
    assert SETS["svhn"].files(Path()) == [Path(theirs.SVHN.split_list[half][1]) for half in ("train", "test")]


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_equals_torchvision(name: str, tmp_path: Path, theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(name, tmp_path, theirs, monkeypatch)
    splits = load_splits(DataConfig(name=name, root=tmp_path), seed=0)
    build = getattr(theirs, SETS[name].class_name)
    assert isinstance(splits.train, ImageSet)
    assert isinstance(splits.test, ImageSet)
    assert_same_images(splits.train, build(tmp_path, train=True))
    assert_same_images(splits.test, build(tmp_path, train=False))
    assert splits.train.classes == ("airplane", "bird", "cat", "deer")
    assert (splits.in_channels, splits.image_size, splits.num_classes) == (3, 32, 4)


@pytest.mark.usefixtures("no_network")
def test_svhn_equals_torchvision(tmp_path: Path, theirs: Any, savemat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write_svhn(tmp_path, theirs, savemat, monkeypatch)
    train, test = load_named("svhn", tmp_path, None)
    assert_same_images(train, theirs.SVHN(tmp_path, split="train"))
    assert_same_images(test, theirs.SVHN(tmp_path, split="test"))
    assert train.labels.tolist() == [0, 1, 9, 0]
    assert train.classes == tuple("0123456789")


def test_svhn_without_scipy_names_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_train.data.sets.catalog.find_spec", lambda _: None)
    for attempt in (lambda: load_named("svhn", tmp_path, None), lambda: fetch("svhn", tmp_path)):
        with pytest.raises(ConfigError, match=r'pip install "dist-train\[svhn\]"'):
            attempt()


def test_damaged_cifar_file_error_names_fix(tmp_path: Path, theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar("cifar10", tmp_path, theirs, monkeypatch)
    (tmp_path / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"rot")
    with pytest.raises(DataError) as caught:
        load_named("cifar10", tmp_path, None)
    assert str(tmp_path / "cifar-10-batches-py") in str(caught.value)
    assert "Delete its files there" in str(caught.value)
    assert "dist-train data fetch cifar10" in str(caught.value)


# --- downloading -------------------------------------------------------------------------------------------------


def point_to(mirror: str, theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (theirs.FashionMNIST, theirs.KMNIST):
        monkeypatch.setattr(kind, "mirrors", [mirror])
    for kind in (theirs.EMNIST, theirs.CIFAR10, theirs.CIFAR100):
        monkeypatch.setattr(kind, "url", f"{mirror}{kind.url.rsplit('/', 1)[1]}")
    listed = {half: [f"{mirror}{entry[1]}", *entry[1:]] for half, entry in theirs.SVHN.split_list.items()}
    monkeypatch.setattr(theirs.SVHN, "split_list", listed)


@pytest.mark.parametrize("name", ["fashion_mnist", "kmnist", "emnist", "cifar10", "cifar100", "svhn"])
def test_unreachable_mirror_error_names_command(
    name: str,
    tmp_path: Path,
    theirs: Any,
    closed_port: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if name == "svhn":
        pytest.importorskip("scipy")
    point_to(f"http://127.0.0.1:{closed_port}/", theirs, monkeypatch)
    with pytest.raises(DataError) as caught:
        load_splits(DataConfig(name=name, root=tmp_path, split="digits" if name == "emnist" else None), seed=0)
    message = str(caught.value)
    assert "\n" not in message
    assert f"{name} is not in {tmp_path / SETS[name].folder} and could not be downloaded" in message
    assert "Connection refused" in message
    assert message.endswith(f"DIST_TRAIN_DATA_DIR={tmp_path} dist-train data fetch {name}")
    assert [path.name for path in tmp_path.iterdir()] == [".dist_train.lock"]  # no partial files
    assert capfd.readouterr() == ("", "")
    assert socket.getdefaulttimeout() is None


def fashion_archives(folder: Path, theirs: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Write the four archives of a small FashionMNIST to `folder` and return their contents."""
    folder.mkdir(parents=True)
    contents, resources = {}, []
    for filename, _ in theirs.FashionMNIST.resources:
        shape = (5, 4, 4) if "images" in filename else (5,)
        contents[filename.removesuffix(".gz")] = content = idx_bytes(NUMBERS.integers(0, 10, shape, dtype=np.uint8))
        (folder / filename).write_bytes(gzip.compress(content))
        resources.append((filename, hashlib.md5((folder / filename).read_bytes()).hexdigest()))
    monkeypatch.setattr(theirs.FashionMNIST, "resources", resources)
    return contents


def test_download_leaves_no_other_files(
    mirror: tuple[Path, str],
    tmp_path: Path,
    theirs: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder, address = mirror
    contents = fashion_archives(folder, theirs, monkeypatch)
    point_to(address, theirs, monkeypatch)
    root = tmp_path / "data"
    (root / ".download-of-a-killed-process" / "x").mkdir(parents=True)
    train, _ = load_named("fashion_mnist", root, None)
    assert len(train) == 5
    raw = root / "FashionMNIST" / "raw"
    assert {path.name: path.read_bytes() for path in raw.iterdir()} == contents
    assert {path.name for path in root.iterdir()} == {"FashionMNIST", ".dist_train.lock"}
    assert capfd.readouterr() == ("", "")  # no progress bars by default
    shutil.rmtree(raw)
    fetch("fashion_mnist", root, progress=True)
    assert "100%" in capfd.readouterr().err


def test_interrupted_download_leaves_nothing(
    mirror: tuple[Path, str], tmp_path: Path, theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = mirror
    fashion_archives(folder, theirs, monkeypatch)
    last = folder / theirs.FashionMNIST.resources[-1][0]
    last.write_bytes(last.read_bytes()[:-9])
    point_to(address, theirs, monkeypatch)
    with pytest.raises(DataError, match=f"Error downloading {last.name}.*corrupted"):
        fetch("fashion_mnist", tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".dist_train.lock"]


@pytest.mark.usefixtures("no_network")
def test_manually_placed_archives_are_used(tmp_path: Path, theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    contents = fashion_archives(raw, theirs, monkeypatch)
    fetch("fashion_mnist", tmp_path)
    assert {path.name: path.read_bytes() for path in raw.iterdir() if path.suffix != ".gz"} == contents
    assert len(list(raw.glob("*.gz"))) == 4
    assert not any(path.is_symlink() for path in raw.iterdir())


@pytest.mark.usefixtures("no_network")
def test_valid_archives_with_other_checksum_are_accepted(
    tmp_path: Path, theirs: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    contents = fashion_archives(raw, theirs, monkeypatch)
    name = "t10k-labels-idx1-ubyte"
    other = gzip.compress(contents[name], compresslevel=1, mtime=7)
    (raw / f"{name}.gz").write_bytes(other)
    train, test = load_named("fashion_mnist", tmp_path, None)
    assert (len(train), len(test)) == (5, 5)
    assert {path.name: path.read_bytes() for path in raw.iterdir() if path.suffix != ".gz"} == contents
    assert (raw / f"{name}.gz").read_bytes() == other
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert f"{raw / name}.gz: a valid archive" in warning
    assert hashlib.md5(other).hexdigest() in warning


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("damaged", [b"", b"no archive", gzip.compress(b"no IDX file"), gzip.compress(b"x" * 99)[:-20]])
def test_damaged_archive_is_rejected(
    damaged: bytes, tmp_path: Path, theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    fashion_archives(raw, theirs, monkeypatch)
    (raw / "train-labels-idx1-ubyte.gz").write_bytes(damaged)
    point_to("http://127.0.0.1:1/", theirs, monkeypatch)
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(DataError, match="could not be downloaded"):
        fetch("fashion_mnist", tmp_path)
    assert {path.suffix for path in raw.iterdir()} == {".gz"}
    assert (raw / "train-labels-idx1-ubyte.gz").read_bytes() == damaged


def test_fetch_reports_files_and_their_folder(tmp_path: Path) -> None:
    command = [*DIST_TRAIN, "data", "fetch", "mnist", "--root", str(tmp_path / "data")]
    done = run_forked(command, tmp_path)
    assert done.returncode == 0, done.stderr
    raw = tmp_path / "data/MNIST/raw"
    lines = done.stdout.splitlines()
    assert f"Unpacked {raw / 'train-images-idx3-ubyte'}." in lines
    assert lines[-1] == f"mnist is in {raw}: 4 files, 55.0 MB"
    assert run_forked(command, tmp_path).stdout.splitlines() == lines[-1:]


@pytest.mark.usefixtures("no_network")
def test_emnist_archive_provides_every_split(tmp_path: Path, theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tmp_path / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    with zipfile.ZipFile(raw / "gzip.zip", "w") as archive:
        for path in SETS["emnist"].files(Path()):
            shape = (3, 2, 2) if "images" in path.name else (3,)
            content = io.BytesIO()
            with gzip.open(content, "wb") as packed:
                packed.write(idx_bytes(NUMBERS.integers(0, 10, shape, dtype=np.uint8)))
            archive.writestr(f"gzip/{path.name}.gz", content.getvalue())
    monkeypatch.setattr(theirs.EMNIST, "md5", hashlib.md5((raw / "gzip.zip").read_bytes()).hexdigest())
    assert fetch("emnist", tmp_path) == raw
    assert len([path for path in raw.iterdir() if path.name.endswith("ubyte")]) == 6 * 4
    for split in EMNIST_CLASSES:
        assert len(load_named("emnist", tmp_path, split)[0]) == 3


def test_full_disk_while_downloading_is_not_network_error(
    tmp_path: Path, theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(theirs, "FashionMNIST", full)
    with pytest.raises(DataError, match=r"Cannot write to .*: No space left on device.*data\.root"):
        fetch("fashion_mnist", tmp_path)


def test_fetching_existing_files_uses_no_network(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_idx_set("kmnist", tmp_path, None, num_classes=10)
    with caplog.at_level(logging.INFO):
        assert fetch("kmnist", tmp_path) == tmp_path / "KMNIST" / "raw"
    assert not caplog.records
    assert not (tmp_path / ".dist_train.lock").exists()


def test_available_sets(tmp_path: Path) -> None:
    write_idx_set("kmnist", tmp_path, None, num_classes=10)
    write_idx_set("emnist", tmp_path, "letters", num_classes=10)
    rows = {row.name: row for row in available_sets(tmp_path)}
    assert set(rows) == set(SETS)
    assert {name for name, row in rows.items() if row.present} == {"mnist", "kmnist", "emnist"}
    assert rows["kmnist"].path == tmp_path / "KMNIST" / "raw"
    assert rows["emnist"].note == "data.split: letters"


def test_data_is_imported_without_torchvision() -> None:
    script = "import sys, dist_train.data; print('torchvision' in sys.modules, 'dist_train.data' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert output.stdout.split() == ["False", "True"]
