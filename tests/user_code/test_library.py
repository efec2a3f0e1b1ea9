"""user_code.library: names, versions and digests; nothing is lost, half there, or deleted while it is used."""

from __future__ import annotations

import fcntl
import random
import signal
import subprocess
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dist_train.config.loading import parse_config, to_yaml
from dist_train.errors import DistTrainError, LibraryError, UserCodeError
from dist_train.user_code.library import (
    Kind,
    Version,
    add_empty,
    add_folder,
    add_zip,
    check_name,
    delete,
    entries,
    find,
    last_change,
    library_root,
    remove_unfinished,
    uses,
)
from support.bundle_files import TUTORIAL
from support.processes import DIST_TRAIN, run


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own library; in a folder whose name YAML folds and escapes."""
    folder = tmp_path / "my data sets, my models and all of my other things, with long names and an é"
    monkeypatch.setenv("DIST_TRAIN_DATA_DIR", str(folder))
    return folder


def zipped(archive: Path, **files: str) -> Path:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name, text in files.items():
            file.writestr(name.replace("__", "/"), text)
    return archive


def tutorial(folder: Path, extra: str = "") -> Path:
    return zipped(folder / "bks.zip", **{"bks_model.py": (TUTORIAL / "bks_model.py").read_text() + extra})


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def left_over() -> list[Path]:
    return list(library_root().rglob(".writing*"))


# --- versions ---


def test_new_contents_are_a_new_version_and_old_ones_stay(tmp_path: Path) -> None:
    first = add_zip(Kind.MODELS, "bks", tutorial(tmp_path))
    content = files_of(first.path)
    second = add_zip(Kind.MODELS, "bks", tutorial(tmp_path, "# edited\n"))
    assert (first.number, second.number) == (1, 2)
    assert first.digest != second.digest
    assert first.version == f"1-{first.digest[:12]}"
    assert files_of(first.path) == content
    [entry] = entries(Kind.MODELS)
    assert entry.versions == (first, second)
    assert entry.newest == second == find(Kind.MODELS, "bks")
    assert find(Kind.MODELS, "bks").path == second.path
    assert find(Kind.MODELS, "bks", first.version).path == first.path
    assert (first.files, first.bytes) == (1, (TUTORIAL / "bks_model.py").stat().st_size)
    assert first.check.summary == "UserModel: loss, metrics"
    assert entries(Kind.LOADERS) == entries(Kind.DATASETS) == []


def test_same_contents_are_the_same_version_however_they_are_packed(tmp_path: Path) -> None:
    files = {"b.py": "b", "a__c.py": "c", "bks_model.py": "pass"}
    first = add_zip(Kind.MODELS, "net", zipped(tmp_path / "1.zip", **files))
    other_order = zipped(tmp_path / "2.zip", **dict(reversed(files.items())))
    assert add_zip(Kind.MODELS, "net", other_order) == first
    with zipfile.ZipFile(tmp_path / "3.zip", "w", zipfile.ZIP_STORED) as file:
        for name, text in files.items():
            file.writestr(name.replace("__", "/"), text)
    assert add_zip(Kind.MODELS, "net", tmp_path / "3.zip") == first
    moved = add_zip(Kind.MODELS, "net", zipped(tmp_path / "4.zip", **{**files, "b.py": "c", "a__c.py": "b"}))
    assert moved.digest != first.digest


def test_deleted_number_with_other_contents_is_another_path(tmp_path: Path) -> None:
    """A run that was moved away still names the old path: it must not find other code there."""
    first = add_zip(Kind.MODELS, "bks", tutorial(tmp_path))
    delete(Kind.MODELS, "bks", runs=tmp_path)
    second = add_zip(Kind.MODELS, "bks", tutorial(tmp_path, "# edited\n"))
    assert first.number == second.number
    assert first.path != second.path


def test_folder_is_linked_and_not_copied(tmp_path: Path) -> None:
    folder = tmp_path / "net"
    folder.mkdir()
    (folder / "bks_model.py").write_text("class UserModel: pass\n")
    version = add_folder(Kind.MODELS, "net", folder)
    assert version.source == str(folder)
    assert version.path.resolve() == folder
    assert version.check.problems == (
        "bks_model.py:1 UserModel is not a torch.nn.Module. Derive it from that class.",
        "bks_model.py:1 UserModel has no method loss(output, target).",
    )
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__/x.pyc").touch()
    assert add_folder(Kind.MODELS, "net", folder) == version  # what an import leaves is no change
    (folder / "bks_model.py").write_text("class UserModel: x = 1\n")
    assert add_folder(Kind.MODELS, "net", folder).number == 2
    delete(Kind.MODELS, "net", runs=tmp_path)
    assert (folder / "bks_model.py").exists()
    with pytest.raises(LibraryError, match="is no folder of this machine"):
        add_folder(Kind.MODELS, "net", tmp_path / "none")
    with pytest.raises(LibraryError, match="is neither a zip nor a folder"):
        add_zip(Kind.MODELS, "net", tmp_path / "none")


def test_folder_of_data_is_listed_and_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for name in ("b/1.png", "a/2.png", "a/3.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(5))
    (folder / "dangling").symlink_to("nowhere")
    version = add_folder(Kind.DATASETS, "images", folder)
    assert (version.files, version.bytes, version.check.summary) == (3, 15, "a, b, dangling")
    (folder / "a/2.png").write_bytes(bytes(range(5)))
    assert add_folder(Kind.DATASETS, "images", folder) == version
    (folder / "a/2.png").write_bytes(bytes(6))
    assert add_folder(Kind.DATASETS, "images", folder).digest != version.digest


def test_folder_that_is_no_code_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(2001):
        (folder / f"{number}.jpg").touch()
    with pytest.raises(LibraryError, match="holds more than 2000 files"):
        add_folder(Kind.LOADERS, "images", folder)
    assert left_over() == []
    assert add_folder(Kind.DATASETS, "images", folder).files == 2001


def test_empty_data_set_is_a_folder_to_write_into(tmp_path: Path) -> None:
    version = add_empty("mnist")
    (version.path / "MNIST").mkdir()  # as torchvision does
    assert version.check.summary == "empty"
    with pytest.raises(LibraryError, match="There is a data set mnist already"):
        add_empty("mnist")
    assert (version.path / "MNIST").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "a b", "é", "-x", ".x", "x\n", "a" * 101, "x\0"])
def test_what_is_no_name_is_refused(name: str, tmp_path: Path) -> None:
    for call in (check_name, add_empty, lambda name: find(Kind.MODELS, name)):
        with pytest.raises(LibraryError):
            call(name)
    assert not library_root().exists()


def test_unknown_name_is_told_with_the_nearest(tmp_path: Path) -> None:
    version = add_empty("mnist-empty")
    with pytest.raises(LibraryError, match=r"There is no mnist-emty among the datasets\. Did you mean mnist-empty\?"):
        find(Kind.DATASETS, "mnist-emty")
    with pytest.raises(LibraryError, match=rf"has no version 7\. It has: {version.version}\."):
        find(Kind.DATASETS, "mnist-empty", "7")


# --- weights ---


def weights_as(form: str, folder: Path) -> Path:
    weights = {"fc.weight": torch.ones(2, 3)}
    path = folder / "weights.bin"  # names do not count
    if form == "safetensors":
        save_file(weights, str(path))
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=form != "old pth")
    if form == "zip":
        with zipfile.ZipFile(folder / "w.zip", "w") as file:
            file.write(path, "model.pth")
        return folder / "w.zip"
    return path


@pytest.mark.parametrize("form", ["pth", "old pth", "safetensors", "zip"])
def test_weights_lie_beside_the_version(form: str, tmp_path: Path) -> None:
    archive, weights = tutorial(tmp_path), weights_as(form, tmp_path)
    version = add_zip(Kind.MODELS, "bks", archive, weights=weights)
    assert version.weights is not None
    suffix = ".safetensors" if form == "safetensors" else ".pth"
    assert version.weights == version.path.parent / f"weights{suffix}"
    assert version.weights.read_bytes() == (tmp_path / "weights.bin").read_bytes()
    assert add_zip(Kind.MODELS, "bks", archive).number == 2  # other weights, none, are another version
    assert add_zip(Kind.MODELS, "bks", archive, weights=weights) == version
    assert sorted(path.name for path in version.path.parent.iterdir()) == [
        "files", "version.json", f"weights{suffix}",
    ]  # fmt: skip


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\3\4", b"\xff" * 20, bytes(600)], ids=repr)
def test_what_are_no_weights_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(UserCodeError, match="weights"):
        add_zip(Kind.MODELS, "bks", tutorial(tmp_path), weights=tmp_path / "w")
    assert entries(Kind.MODELS) == []
    assert left_over() == []


def test_zip_without_weights_is_refused(tmp_path: Path) -> None:
    for files in ({"readme": "x"}, {"a.pth": "x", "b.pth": "y"}):
        with pytest.raises(UserCodeError, match="weights"):
            add_zip(Kind.MODELS, "bks", tutorial(tmp_path), weights=zipped(tmp_path / "w.zip", **files))


# --- use and deletion ---


def write_run(folder: Path, **settings: str) -> None:
    folder.mkdir(parents=True)
    sections: dict[str, dict[str, str]] = {}
    for key, value in settings.items():
        section, name = key.split("_", 1)
        sections.setdefault(section, {})[name] = value
    (folder / "config.yaml").write_text(to_yaml(parse_config(sections)))


def test_used_version_is_not_deleted(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    old, new = (add_zip(Kind.MODELS, "bks", tutorial(tmp_path, extra)) for extra in ("", "# edited\n"))
    empty, other = add_empty("mnist"), add_empty("mnist-2")
    write_run(runs / "first", model_bundle=str(old.path), data_root=str(empty.path))
    write_run(runs / ".bin/123-deleted", data_root=str(empty.path))
    (runs / "broken").mkdir()
    (runs / "broken/config.yaml").write_bytes(b"\xff\xfe")
    used = {
        (v.kind, v.name, v.version): names for v, names in ((old, ["first"]), (empty, ["deleted in the bin", "first"]))
    }
    assert uses(runs) == used
    with pytest.raises(LibraryError, match=rf"models/bks {old.version} is used by first\. Delete those first\."):
        delete(Kind.MODELS, "bks", old.version, runs=runs)
    with pytest.raises(LibraryError, match="is used by first"):
        delete(Kind.MODELS, "bks", runs=runs)  # of all or of none
    assert find(Kind.MODELS, "bks") == new
    delete(Kind.MODELS, "bks", new.version, runs=runs)
    assert find(Kind.MODELS, "bks") == old
    with pytest.raises(LibraryError, match="is used by deleted in the bin, first"):
        delete(Kind.DATASETS, "mnist", runs=runs)
    delete(Kind.DATASETS, "mnist-2", runs=runs)
    assert [entry.name for entry in entries(Kind.DATASETS)] == ["mnist"]
    assert not other.path.exists()
    (runs / "first/config.yaml").write_text("seed: 1\n")  # an edited file is read again
    script = runs / "first/job.sbatch"  # of a job that has not begun: there are no settings yet
    script.write_text(f"srun dist-train train -c mnist_bks -o 'model.bundle={old.path}'\n")
    with pytest.raises(LibraryError, match="is used by first"):
        delete(Kind.MODELS, "bks", runs=runs)
    script.unlink()
    delete(Kind.MODELS, "bks", runs=runs)
    assert entries(Kind.MODELS) == []


# --- at the same time, killed, damaged ---


def test_one_process_changes_a_name_at_a_time(tmp_path: Path) -> None:
    """Of many at once each adds whole, or is told to wait; the numbers have no gaps."""
    archives = [zipped(tmp_path / f"{number}.zip", **{"bks_model.py": f"x = {number}"}) for number in range(12)]
    refused: list[str] = []

    def add(archive: Path) -> Version | None:
        try:
            return add_zip(Kind.MODELS, "net", archive)
        except LibraryError as error:
            refused.append(str(error))
            return None

    with ThreadPoolExecutor(6) as threads:
        added = [version for version in threads.map(add, archives) if version]
    assert all("is being changed by another process" in text for text in refused)
    [entry] = entries(Kind.MODELS)
    assert sorted(added, key=lambda each: each.number) == list(entry.versions)
    assert [version.number for version in entry.versions] == list(range(1, len(added) + 1))
    assert left_over() == []


def test_refused_change_leaves_the_folder_of_another_process(tmp_path: Path) -> None:
    """Which has made it, and has nothing in it yet."""
    home = library_root() / Kind.MODELS / "net"
    home.mkdir(parents=True)
    with (home.parent / ".net.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(LibraryError, match="is being changed by another process"):
            add_zip(Kind.MODELS, "net", tutorial(tmp_path))
        assert home.is_dir()


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(1, 30))])
def test_killed_process_leaves_whole_versions_only(seed: int, tmp_path: Path) -> None:
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for number in range(3000):
            file.writestr(f"{number % 50}/{number}", number.to_bytes(4))
    first = add_zip(Kind.DATASETS, "set", tutorial(tmp_path))
    command = [*DIST_TRAIN, "library", "add", "datasets", "set", str(archive), "--progress"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it is unpacking
        time.sleep(random.Random(seed).random() / 5)
        process.send_signal(signal.SIGKILL)
    versions = entries(Kind.DATASETS)[0].versions
    assert versions[0] == first
    for version in versions[1:]:
        assert len(files_of(version.path)) == 3000
    remove_unfinished()
    assert left_over() == []
    assert add_zip(Kind.DATASETS, "set", archive).files == 3000


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"created": "x"}', '{"check": 5}'])
def test_damaged_description_hides_the_version_alone(content: str, tmp_path: Path) -> None:
    first, second = (add_zip(Kind.MODELS, "bks", tutorial(tmp_path, extra)) for extra in ("", "# edited\n"))
    (second.path.parent / "version.json").write_text(content)
    (library_root() / "models/a file").touch()
    (library_root() / "models/bks/odd").mkdir()
    (library_root() / "models/foreign").mkdir()
    [entry] = entries(Kind.MODELS)
    assert entry.versions == (first,)


def test_list_tells_when_it_changed(tmp_path: Path) -> None:
    seen = [last_change(Kind.DATASETS)]
    changes: list[Callable[[], object]] = [
        lambda: add_empty("a"), lambda: add_zip(Kind.DATASETS, "a", tutorial(tmp_path)), lambda: add_empty("b"),
        lambda: delete(Kind.DATASETS, "a", "1-e3b0c44298fc", runs=tmp_path),
        lambda: delete(Kind.DATASETS, "b", runs=tmp_path),
    ]  # fmt: skip
    for change in changes:
        change()
        seen.append(last_change(Kind.DATASETS))
    assert len(set(seen)) == len(seen)


# --- the command line ---


def test_command_line_shows_the_same(tmp_path: Path, data: Path) -> None:
    where = {"DIST_TRAIN_DATA_DIR": str(data)}
    archive = tutorial(tmp_path)
    done = run([*DIST_TRAIN, "library", "add", "models", "bks", str(archive)], tmp_path, **where)
    version = find(Kind.MODELS, "bks")
    assert done.stdout.splitlines() == [f"models/bks {version.version}: UserModel: loss, metrics", str(version.path)]
    listed = run([*DIST_TRAIN, "library", "ls"], tmp_path, **where).stdout
    assert str(version.path) in listed
    write_run(tmp_path / "runs/one", model_bundle=str(version.path))
    refused = run([*DIST_TRAIN, "library", "rm", "models", "bks"], tmp_path, **where)
    assert refused.returncode == 1
    assert refused.stderr == f"error: models/bks {version.version} is used by one. Delete those first.\n"


def test_failed_write_is_told_in_one_line(tmp_path: Path, data: Path) -> None:
    data.parent.mkdir(exist_ok=True)
    data.write_text("a file")
    with pytest.raises(DistTrainError, match=r"cannot be written: .*Set DIST_TRAIN_DATA_DIR\."):
        add_empty("x")
    assert data.is_file()
