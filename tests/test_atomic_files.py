"""Atomic writes: a file or folder is complete or absent, also after a power failure."""

from __future__ import annotations

import os
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_train.atomic_files import atomic_write, remove_leftovers, temporary_path
from dist_train.checkpoints.contents import TrainerState
from dist_train.checkpoints.manifest import folder_of
from dist_train.distributed.world import World
from dist_train.runs.directory import RunDir
from dist_train.runs.metrics_log import MetricsFile
from dist_train.user_code.archives import unpack_archive
from support.run_files import contents
from support.tiny_runs import checkpoints_of, new_step, write_at


def make(path: Path, kind: str, text: str) -> None:
    if kind == "folder":
        (path / "sub").mkdir(parents=True)
        path /= "sub/file"
    path.write_text(text)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_target_appears_only_when_complete(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "it"
    with atomic_write(target) as temporary:
        make(temporary, kind, "new")
        assert not target.exists()
    assert [*contents(tmp_path).values()] == [b"new"]


def test_new_file_replaces_old_file(tmp_path: Path) -> None:
    (tmp_path / "it").write_text("old")
    with atomic_write(tmp_path / "it") as temporary:
        temporary.write_text("new")
        assert (tmp_path / "it").read_text() == "old"
    assert contents(tmp_path) == {"it": b"new"}


@pytest.mark.parametrize("broken", ["replace", "fsync", "body", "before_rename"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_failure_keeps_old_content_and_leaves_nothing_else(
    broken: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def write() -> None:
        before_rename = fail if broken == "before_rename" else lambda: None
        with atomic_write(tmp_path / "it", before_rename=before_rename) as temporary:
            make(temporary, kind, "new")
            if broken == "body":
                fail()

    make(tmp_path / "it", kind, "old")
    before = contents(tmp_path)
    if broken in ("replace", "fsync"):
        monkeypatch.setattr(Path if broken == "replace" else os, broken, fail)
    with pytest.raises(OSError, match="No space left"):
        write()
    assert contents(tmp_path) == before


def test_nonempty_folder_is_not_replaced(tmp_path: Path) -> None:
    """If several processes create the same folder, the first one wins."""
    make(tmp_path / "it", "folder", "first")
    with pytest.raises(OSError, match="not empty"), atomic_write(tmp_path / "it") as temporary:
        make(temporary, "folder", "second")
    assert contents(tmp_path) == {"it/sub/file": b"first"}


def test_file_modes_follow_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "file") as temporary:
            temporary.write_text("x")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640  # for a group that shares a data folder


def test_only_leftovers_are_removed(tmp_path: Path) -> None:
    for kind in ("file", "folder"):
        make(temporary_path(tmp_path / "it"), kind, "half")
    (tmp_path / ".mine").touch()
    remove_leftovers(tmp_path)
    assert contents(tmp_path) == {".mine": b""}


# --- fsync -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """All fsync calls and renames (from, to) in order."""
    calls: list[tuple[str, Path]] = []
    fsync, replace = os.fsync, Path.replace

    def traced_fsync(descriptor: int) -> None:
        calls.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    def traced_replace(self: Path, target: Path) -> Path:
        calls.extend([("from", self), ("to", target)])
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(Path, "replace", traced_replace)
    return calls


def result(folder: Path) -> Path:
    run_dir = RunDir(folder)
    run_dir.write_result({"step": 1})
    return run_dir.result


def line_cut(folder: Path) -> Path:
    metrics = MetricsFile(folder / "metrics.jsonl")
    for step in (1, 2):
        metrics.append({"step": step})
    metrics.cut(1)
    return metrics.path


def checkpoint(folder: Path) -> Path:
    return write_at(RunDir(folder), 1)


def code(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "code.zip", "w") as archive:
        archive.writestr("sub/net.py", "x = 1")
    return unpack_archive(folder / "code.zip", "code.zip")


@pytest.mark.parametrize("made_by", [result, line_cut, checkpoint, code])
def test_contents_are_synced_before_rename_and_folder_after_it(
    made_by: Callable[[Path], Path], tmp_path: Path, trace: list[tuple[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIST_TRAIN_DATA_DIR", str(tmp_path))
    target = made_by(tmp_path)
    renamed = trace.index(("to", target))
    temporary = trace[renamed - 1][1]
    written = {temporary, *(temporary / path.relative_to(target) for path in target.rglob("*"))}
    assert written <= {path for what, path in trace[:renamed] if what == "sync"}
    assert trace[renamed + 1] == ("sync", target.parent)


def test_lines_are_synced_before_the_checkpoint_and_not_by_the_loop(
    world: World, run_dir: RunDir, trace: list[tuple[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut loses no line up to a checkpoint that it leaves; a slow disk does not hold up training."""
    fsync, by = os.fsync, set[threading.Thread]()

    def traced_fsync(descriptor: int) -> None:
        by.add(threading.current_thread())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    checkpoints = checkpoints_of(run_dir, world)
    run_dir.append_metrics({"step": 1})
    checkpoints.save(TrainerState(step=1), new_step(world, 0))
    checkpoints.finish()
    checkpoints.close()
    assert trace.index(("sync", run_dir.metrics.path)) < trace.index(("to", folder_of(run_dir, 1)))
    assert threading.current_thread() not in by
