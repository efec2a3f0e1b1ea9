"""user_code.bundles and user_code.archives: BK.Synapse bundles in folders and zips, including malicious zips."""

from __future__ import annotations

import multiprocessing
import pickle
import random
import shutil
import stat
import struct
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.data.sets.bundle import load_dataset_bundle
from dist_train.data.sets.image_set import num_examples
from dist_train.errors import ConfigError, UserCodeError
from dist_train.models.bundle import load_model_bundle
from dist_train.torchvision_compat import import_torchvision
from dist_train.user_code import archives
from dist_train.user_code.contents import CODE
from support.bundle_files import DATASET, TUTORIAL

import_torchvision()  # here and not in a test: importing it changes the environment (torch._dynamo does)


MODEL = """
from torch import nn

class UserModel(nn.Linear):
    def __init__(self, width=2):
        super().__init__(width, 1)
    def loss(self, output, target):
        return (output - target).square().mean()
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An own cache folder; modules that a test imports are removed from sys.modules afterwards."""
    monkeypatch.setenv("DIST_TRAIN_DATA_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path / "cache"
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith((str(tmp_path), str(TUTORIAL))):
            del sys.modules[name]


@pytest.fixture
def tiny_mnist(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A `fetch` that writes sets of 4 images. Returns the list of roots for which it was called."""
    roots: list[Path] = []

    def fetch(name: str, root: Path, split: str | None) -> None:
        assert (name, split) == ("mnist", None)
        roots.append(root)
        if not (root / "MNIST").exists():
            write_mnist(root / "MNIST" / "raw")

    monkeypatch.setattr("dist_train.data.sets.bundle.fetch", fetch)
    return roots


def write_mnist(folder: Path, count: int = 4) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for start in ("train", "t10k"):
        images = struct.pack(">IIII", 0x0803, count, 28, 28) + bytes(count * 28 * 28)
        (folder / f"{start}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{start}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x0801, count) + bytes(range(count)))


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in files.items():
        (folder / f"{name}.py").write_text(source)
    return folder


def zipped(folder: Path, archive: Path, inside: str = "") -> Path:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.glob("*.py")):
            file.write(path, inside + path.name)
    return archive


# --- the tutorial ---


def tutorial_as(form: str, folder: Path) -> Path:
    if form == "folder":
        return TUTORIAL
    return zipped(TUTORIAL, folder / "bundle.zip", "mnist_bks/" if form == "zip of a folder" else "")


@pytest.mark.parametrize("form", ["folder", "zip", "zip of a folder"])
def test_tutorial_runs_unchanged(form: str, tmp_path: Path, tiny_mnist: list[Path]) -> None:
    path, root = tutorial_as(form, tmp_path), tmp_path / "data"
    sets: dict[str, Any] = load_dataset_bundle(path, root)
    train, val = sets.values()
    assert tiny_mnist
    assert (type(train).__name__, type(val).__name__) == ("UserDataset", "UserValDataset")
    images, labels = train.collate([train[index] for index in range(4)])
    assert images.shape == (4, 1, 28, 28)
    assert labels.tolist() == [0, 1, 2, 3]
    assert (root / "UserDataset").readlink() == Path("MNIST")

    model: Any = load_model_bundle(path)
    logits = model(images)
    assert logits.shape == (4, 10)
    assert model.loss(logits, labels).ndim == 0
    assert set(model.metrics(logits, labels)) == {"accuracy"}


def test_tutorial_with_bundled_mnist(tmp_path: Path) -> None:
    train: Any
    val: Any
    train, val = load_dataset_bundle(TUTORIAL, tmp_path / "data").values()
    assert (len(train), len(val)) == (60_000, 10_000)
    assert [int(label) for label in train.targets[:5]] == [5, 0, 4, 1, 9]


def test_validation_set_is_optional(tmp_path: Path) -> None:
    sets: dict[str, Any] = load_dataset_bundle(write(tmp_path / "b", bks_dataset=DATASET), tmp_path / "data")
    assert [*sets] == ["train"]
    assert sets["train"].path == str(tmp_path / "data")


# --- several bundles in one process, workers ---


def test_bundles_with_same_helper_names_are_separate(tmp_path: Path) -> None:
    for name in ("a", "b"):
        head = "from helpers import WHO\nfrom parts.deep import WHERE\n"
        write(tmp_path / name, helpers=f"WHO = {name!r}\n", bks_dataset=head + DATASET + "    who = WHO + WHERE\n")
        write(tmp_path / name, bks_model="from helpers import WHO\n" + MODEL + "    who = WHO\n")
        write(tmp_path / name / "parts", __init__="", deep=f"WHERE = {name!r}\n")
    data: list[Any] = [load_dataset_bundle(tmp_path / name, tmp_path / "data")["train"] for name in ("a", "b", "a")]
    nets: list[Any] = [load_model_bundle(tmp_path / name) for name in ("a", "b")]
    assert [found.who for found in data] == ["aa", "bb", "aa"]
    assert [net.who for net in nets] == ["a", "b"]
    assert type(data[0]) is type(data[2])


def test_edited_file_is_imported_again(tmp_path: Path) -> None:
    first: Any = load_model_bundle(write(tmp_path / "b", bks_model=MODEL))
    second: Any = load_model_bundle(write(tmp_path / "b", bks_model=MODEL + "    edited = True\n"))
    assert second.edited
    assert not hasattr(first, "edited")


def lengths(pickled: bytes) -> tuple[int, str]:
    dataset = pickle.loads(pickled)
    return len(dataset), type(dataset.transform).__name__


def test_spawned_worker_can_unpickle_set(tmp_path: Path) -> None:
    helper = "class Twice:\n    def __call__(self, x): return 2 * x\n"
    source = f"import torchvision\nfrom my_transforms import Twice\n{DATASET}    @property\n    def transform(self):\n"
    source += "        return self.kept\n"
    source = source.replace("self.path = data_path", "self.path = data_path; self.kept = Twice()")
    folder = write(tmp_path / "b", my_transforms=helper, bks_dataset=source)
    train = load_dataset_bundle(folder, tmp_path / "data")["train"]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool_result = pool.apply(lengths, (pickle.dumps(train),))
    assert pool_result == (3, "Twice")


# --- errors ---


def message(folder: Path, **files: str) -> str:
    write(folder, **files)
    load: Any = load_model_bundle if "bks_model" in files else lambda path: load_dataset_bundle(path, path / "data")
    with pytest.raises(UserCodeError) as caught:
        load(folder)
    return str(caught.value)


def test_missing_classes_and_methods_are_named(tmp_path: Path) -> None:
    text = message(tmp_path / "1", bks_dataset=DATASET.replace("UserDataset", "UserDatset"))
    assert text.startswith(
        "bks_dataset.py: class UserDataset is missing. Found: UserDatset (line 4). Did you mean UserDatset?"
    )
    text = message(tmp_path / "2", bks_model=MODEL.replace("def loss", "def los"))
    expected = "UserModel (bks_model.py:4) has no method loss(output, target). Did you mean los?"
    assert text.startswith(expected)
    text = message(tmp_path / "3", bks_dataset=DATASET.replace("def collate", "def colate"))
    assert text.startswith("UserDataset (bks_dataset.py:4) has no method collate(batch). Did you mean colate?")
    text = message(tmp_path / "4", bks_model=MODEL.replace("output, target", "output"))
    expected = "UserModel.loss (bks_model.py:7) cannot be called as loss(output, target): too many positional arg"
    assert text.startswith(expected)
    text = message(tmp_path / "5", bks_model=MODEL.replace("nn.Linear", "object"))
    assert text.startswith("UserModel (bks_model.py:4) is not a torch.nn.Module.")
    for method in ("__len__", "__getitem__"):
        text = message(tmp_path / method, bks_dataset=DATASET.replace(method, "other"))
        assert text.startswith(f"UserDataset (bks_dataset.py:4) has no method {method}.")
    text = message(tmp_path / "6", bks_model=MODEL + "    metrics = 3\n")
    assert "has no method metrics(output, target)" in text


def test_failures_are_located(tmp_path: Path) -> None:
    text = message(tmp_path / "1", bks_model="x = 1\nclass UserModel(:\n")
    assert text.startswith(f"model.bundle={tmp_path}/1 cannot be imported: {tmp_path}/1/bks_model.py:2: SyntaxError")
    text = message(tmp_path / "2", bks_dataset=DATASET.replace("self.path = data_path", "open(data_path + '/no')"))
    assert f"failed: {tmp_path}/2/bks_dataset.py:6: FileNotFoundError" in text
    text = message(tmp_path / "3", bks_model=MODEL.replace("width, 1", "width, -1"))
    assert text.startswith("UserModel (bks_model.py:4) cannot be constructed: ")
    assert "bks_model.py:6: RuntimeError" in text


def test_missing_bundle_or_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data\.bundle=.*gone: no such file or folder\."):
        load_dataset_bundle(tmp_path / "gone", tmp_path)
    with pytest.raises(ConfigError, match=r"^data\.bundle=/dev/null: no such file or folder\."):
        load_dataset_bundle(Path("/dev/null"), tmp_path)  # nor is a pipe read, which may never end
    write(tmp_path / "b", bks_datset=DATASET)
    with pytest.raises(UserCodeError, match=r"bks_dataset\.py is missing.* Did you mean bks_datset\.py\?"):
        load_dataset_bundle(tmp_path / "b", tmp_path)
    for name in ("c/one", "c/two"):
        write(tmp_path / name, bks_model=MODEL)
    with pytest.raises(UserCodeError, match=r"in several folders\. Found: one/bks_model\.py, two/bks_model\.py"):
        load_model_bundle(tmp_path / "c")


def test_iterable_data_set_is_rejected(tmp_path: Path) -> None:
    source = DATASET.replace("Dataset,", "IterableDataset,").replace("(Dataset)", "(IterableDataset)")
    with pytest.raises(ConfigError, match=r"UserDataset \(bks_dataset.py:4\) is an IterableDataset\. .*by index"):
        load_dataset_bundle(write(tmp_path / "b", bks_dataset=source), tmp_path)


def test_model_arguments(tmp_path: Path) -> None:
    folder = write(tmp_path / "b", bks_model=MODEL)
    assert load_model_bundle(folder, {"width": 5}).in_features == 5
    with pytest.raises(ConfigError, match=r"model\.args\.widht\. Did you mean model\.args\.width\? It takes: width\."):
        load_model_bundle(folder, {"widht": 5})


# --- torchvision's folders ---


def load_at_once(arguments: tuple[Path, Path]) -> int:
    return num_examples(load_dataset_bundle(*arguments)["train"])


def test_ranks_load_bundle_concurrently(tmp_path: Path, cache: Path) -> None:
    # Real processes: each unpacks the zip, makes the links and unpacks the bundled MNIST, all for the first time.
    archive = zipped(TUTORIAL, tmp_path / "bundle.zip")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(load_at_once, [(archive, tmp_path / "data")] * 2, chunksize=1) == [60_000, 60_000]
    assert len(list((cache / "bundles").iterdir())) == 1  # and no partly unpacked folder


def test_threads_link_concurrently(tmp_path: Path, tiny_mnist: list[Path]) -> None:
    load_dataset_bundle(TUTORIAL, tmp_path / "first")  # the import itself is not thread-safe
    write_mnist(tmp_path / "data" / "MNIST" / "raw")
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(load_at_once, [(TUTORIAL, tmp_path / "data")] * 16)) == [4] * 16


@pytest.mark.parametrize("occupant", ["folder", "link", "file"])
def test_occupied_link_path_is_refused(occupant: str, tmp_path: Path, tiny_mnist: list[Path]) -> None:
    link = tmp_path / "data" / "UserDataset"
    link.parent.mkdir()
    if occupant == "folder":
        link.mkdir()
    elif occupant == "link":
        link.symlink_to("FashionMNIST")
    else:
        link.touch()
    with pytest.raises(UserCodeError, match=r"UserDataset \(bks_dataset\.py:8\) reads .* own data\.root") as caught:
        load_dataset_bundle(TUTORIAL, tmp_path / "data")
    assert str(link) in str(caught.value)


def test_variant_of_mnist_is_linked_without_download(tmp_path: Path, tiny_mnist: list[Path]) -> None:
    source = (TUTORIAL / "bks_dataset.py").read_text().replace("MNIST", "FashionMNIST")
    write_mnist(tmp_path / "data" / "FashionMNIST" / "raw", count=7)
    sets = load_dataset_bundle(write(tmp_path / "b", bks_dataset=source), tmp_path / "data")
    assert num_examples(sets["train"]) == 7
    assert tiny_mnist == []


# --- malicious and damaged zips ---


def entry(name: str, kind: int = stat.S_IFREG) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (kind | 0o644) << 16
    return info


def refusal(archive: Path, cache: Path) -> str:
    with pytest.raises(UserCodeError) as caught:
        load_model_bundle(archive)
    assert list((cache / "bundles").glob("*")) == []  # no leftovers
    return str(caught.value)


@pytest.mark.parametrize(
    "name", ["../evil.py", "a/../../evil.py", "/tmp/evil.py", "..\\evil.py", "a\\b.py", "C:/evil.py", "c:evil.py", ".."]
)
def test_paths_outside_archive_are_rejected(name: str, tmp_path: Path, cache: Path) -> None:
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as file:
        file.writestr("bks_model.py", MODEL)
        file.writestr(entry(name), "evil")
    assert f"the entry {name!r} is not a plain path inside the archive" in refusal(tmp_path / "b.zip", cache)
    assert list(tmp_path.rglob("*evil*")) == []


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_special_files_are_rejected(kind: int, tmp_path: Path, cache: Path) -> None:
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as file:
        file.writestr(entry("bks_model.py", kind), "/etc/passwd")
    assert "'bks_model.py' is a link or a special file" in refusal(tmp_path / "b.zip", cache)


def test_zip_bomb_is_stopped(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_train.user_code.archives.CODE", replace(CODE, bytes=2 * 2**20))
    archive = tmp_path / "b.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bks_model.py", MODEL)
        for name in ("a", "b", "c"):
            file.writestr(name, bytes(2**20))
    assert archive.stat().st_size < 10_000
    assert "holds more than 2 MiB" in refusal(archive, cache)


def test_understated_size_in_header_is_rejected(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_train.user_code.archives.CODE", replace(CODE, bytes=2**20))
    archive = tmp_path / "b.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a", bytes(4 * 2**20))
    size = struct.pack("<I", 4 * 2**20)
    assert archive.read_bytes().count(size) == 2
    archive.write_bytes(archive.read_bytes().replace(size, struct.pack("<I", 100)))
    assert "is not a readable zip" in refusal(archive, cache)  # cut at 100 bytes, the checksum is wrong


def test_too_many_entries_are_rejected(tmp_path: Path, cache: Path) -> None:
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as file:
        for number in range(CODE.entries + 1):
            file.writestr(f"{number}.py", "")
    assert f"has {CODE.entries + 1} entries" in refusal(tmp_path / "b.zip", cache)


@pytest.mark.parametrize("second", ["a.py", "a.py/b.py"])
def test_duplicate_paths_are_rejected(second: str, tmp_path: Path, cache: Path) -> None:
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as file:
        file.writestr("a.py", "first")
        if second != "a.py":
            file.writestr(second, "second")
        else:
            with pytest.warns(UserWarning, match="Duplicate name"):
                file.writestr(second, "second")
    assert f"two entries for {second!r}" in refusal(tmp_path / "b.zip", cache)


def test_encrypted_entries_and_nul_names_are_rejected(tmp_path: Path, cache: Path) -> None:
    zipped(write(tmp_path / "b", bks_model=MODEL), tmp_path / "b.zip")
    content = (tmp_path / "b.zip").read_bytes()
    encrypted = bytearray(content)
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        encrypted[content.index(signature) + flags] |= 1
    (tmp_path / "b.zip").write_bytes(encrypted)
    assert "the entry 'bks_model.py' is encrypted" in refusal(tmp_path / "b.zip", cache)
    (tmp_path / "b.zip").write_bytes(content.replace(b"bks_model.py", b"bks_mod\0l.py"))
    assert r"the entry 'bks_mod\x00l.py' is not a plain path" in refusal(tmp_path / "b.zip", cache)


def test_zip_larger_than_limit_is_not_opened(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_train.user_code.archives.CODE", replace(CODE, bytes=2**20))
    (tmp_path / "b.zip").write_bytes(bytes(2**20 + 1))
    assert "holds more than 1 MiB" in refusal(tmp_path / "b.zip", cache)


def test_damaged_zip_is_rejected_or_unpacks_correctly(tmp_path: Path, cache: Path) -> None:
    """Names may be wrong (they have no checksum), contents never; only UserCodeError, no files outside the cache."""
    sources = {"bks_model.py": MODEL, "parts/__init__.py": "", "parts/layers.py": "width = 8\n" * 40}
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for name, source in sources.items():
            file.writestr(name, source)
    content = (tmp_path / "b.zip").read_bytes()
    rejected = 0
    for seed in range(300):
        rng, damaged = random.Random(seed), bytearray(content)
        for _ in range(rng.choice([1, 1, 4])):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        if rng.random() < 0.3:
            start = rng.randrange(len(damaged))
            del damaged[start : start + rng.choice([1, 10, len(damaged)])]
        (tmp_path / "b.zip").write_bytes(damaged)
        try:
            folder = archives.unpack_archive(tmp_path / "b.zip", "model.bundle=b.zip")
        except UserCodeError:
            rejected += 1
        else:
            assert {path.read_text() for path in folder.rglob("*") if path.is_file()} <= set(sources.values()), seed
    assert 150 < rejected < 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.zip", "cache"]
    assert [*(cache / "bundles").glob(".*")] == []  # no partly unpacked folder


def test_unreadable_zips_are_rejected(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "b.zip").write_text("hello")
    assert "is not a readable zip" in refusal(tmp_path / "b.zip", cache)
    zipped(TUTORIAL, tmp_path / "c.zip")
    content = bytearray((tmp_path / "c.zip").read_bytes())
    content[80:120] = bytes(40)
    (tmp_path / "c.zip").write_bytes(content)
    assert "is not a readable zip" in refusal(tmp_path / "c.zip", cache)


def test_zip_is_unpacked_once_per_content(tmp_path: Path, cache: Path) -> None:
    archive = zipped(write(tmp_path / "b", bks_model=MODEL), tmp_path / "b.zip")
    load_model_bundle(archive)
    shutil.copy(archive, tmp_path / "copy.zip")
    load_model_bundle(tmp_path / "copy.zip")
    folders = list((cache / "bundles").iterdir())
    assert len(folders) == 1
    assert stat.S_IMODE(folders[0].stat().st_mode) == 0o755
    zipped(write(tmp_path / "b", bks_model=MODEL + "    edited = True\n"), archive)
    edited: Any = load_model_bundle(archive)
    assert edited.edited


def test_uncreatable_cache_folder_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DIST_TRAIN_DATA_DIR", str(tmp_path / "file"))
    with pytest.raises(UserCodeError, match=r"cannot be unpacked into .*Set DIST_TRAIN_DATA_DIR"):
        load_model_bundle(zipped(TUTORIAL, tmp_path / "b.zip"))


def test_weights_of_bundle_are_plain_parameters() -> None:
    model = load_model_bundle(TUTORIAL)
    assert sum(weight.numel() for weight in model.parameters()) == 21_840
    assert all(isinstance(weight, torch.nn.Parameter) for weight in model.parameters())
    assert Path(str(sys.modules[type(model).__module__].__file__)).name == "bks_model.py"
