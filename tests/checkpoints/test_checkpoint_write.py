"""Failures at every point of a checkpoint write. The order of writes and syncs: tests/test_atomic_files.py."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dist_train.atomic_files import temporary_path
from dist_train.checkpoints import storage as module
from dist_train.checkpoints.contents import TrainerState
from dist_train.checkpoints.manifest import folder_of, good_checkpoints
from dist_train.distributed.world import World
from dist_train.errors import CheckpointError, RunDirError
from dist_train.runs.attempt import begin_attempt
from dist_train.runs.directory import RunDir
from support.mounts import needs_mounts
from support.patience import wait_until
from support.tiny_runs import CONFIG, checkpoints_of, names, new_step, steps, write_at

FAILURES = ["save_file", "save", "write_json", "fingerprint", "digest", "fsync", "replace"]


@pytest.mark.parametrize(
    ("point", "again"),
    [*itertools.product(FAILURES, [False, True]), ("rename", True)],  # again: the same step
)
def test_failed_write_keeps_older_checkpoint_and_no_leftovers(
    point: str, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path)
    older = write_at(run, 1)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    owner: object = {"save": torch, "fsync": os, "replace": Path, "rename": Path}.get(point, module)
    monkeypatch.setattr(owner, point, fail)
    with pytest.raises((OSError, CheckpointError), match="No space left"):
        write_at(run, 1 if again else 2)
    monkeypatch.undo()
    assert list(good_checkpoints(run)) == [older]
    assert names(run) == [older.name]


def test_kill_between_two_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that resumes at its last checkpoint and stops before its first step saves the same step again."""
    run = RunDir(tmp_path)
    write_at(run, 1)
    replace = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if target == folder_of(run, 1):
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    monkeypatch.setattr(module, "recover_interrupted_replace", lambda _: None)  # a kill gives no time for it
    with pytest.raises(KeyboardInterrupt):
        write_at(run, 1)
    monkeypatch.undo()
    assert not folder_of(run, 1).exists()
    assert list(good_checkpoints(run, set_aside=True)) == [folder_of(run, 1)]
    write_at(run, 1)
    assert names(run) == ["step_00000001"]


def test_leftovers_of_kill_are_removed(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for leftover in (".writing_step_00000001_1", temporary_path(folder_of(run, 1)).name, ".removing_step_00000001"):
        (run.checkpoints / leftover / "half").mkdir(parents=True)
    write_at(run, 2)
    assert names(run) == ["step_00000002"]


def test_leftovers_of_kill_during_pruning_are_removed(
    world: World, run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, step = checkpoints_of(run_dir, world), new_step(world, 0)
    unlink = os.unlink

    def killed(path: str, **more: int) -> None:
        unlink(path, **more)
        raise KeyboardInterrupt

    for number in (1, 2):
        checkpoints.save(TrainerState(step=number), step)
        checkpoints.finish()
    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", killed)
        checkpoints.save(TrainerState(step=3), step)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.finish()
    assert len(names(run_dir)) == 3
    again = checkpoints_of(run_dir, world)
    again.save(TrainerState(step=4), step)
    again.finish()
    assert steps(run_dir) == [3, 4]
    for each in (checkpoints, again):
        each.close()


# --- in the background -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(28, "full"), RuntimeError("full"), CheckpointError("full")], ids=repr)
def test_failed_save_warns_and_next_one_succeeds(
    error: Exception,
    world: World,
    run_dir: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    checkpoints, step = checkpoints_of(run_dir, world), new_step(world, 0)
    for number in (1, 2, 3):
        if number == 2:
            monkeypatch.setattr(torch, "save", fail)
        checkpoints.save(TrainerState(step=number), step)
        if number == 2:
            wait_until(lambda: checkpoints.poll() or caplog.messages, "warning")
            monkeypatch.undo()
        else:
            checkpoints.finish()
    assert steps(run_dir) == [1, 3]
    (warning,) = caplog.messages
    assert "full" in warning
    assert f"The last good checkpoint is {folder_of(run_dir, 1)}" in warning
    assert "Training continues; the next save tries again" in warning
    checkpoints.close()


def test_failed_last_save_fails_run(
    world: World,
    run_dir: RunDir,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoints, step = checkpoints_of(run_dir, world), new_step(world, 0)
    checkpoints.save(TrainerState(step=1), step)
    checkpoints.finish()
    monkeypatch.setattr(os, "fsync", lambda _: os.fstat(-1))  # any OSError
    checkpoints.save(TrainerState(step=2), step)
    with pytest.raises(CheckpointError, match=rf"could not be written to .*Make room.* is {folder_of(run_dir, 1)}"):
        checkpoints.finish()
    checkpoints.close()


def test_superseded_attempt_commits_nothing(world: World, run_dir: RunDir) -> None:
    begin_attempt(RunDir(run_dir.path), CONFIG, "id")
    checkpoints = checkpoints_of(run_dir, world)
    checkpoints.save(TrainerState(step=1), new_step(world, 0))
    with pytest.raises(RunDirError, match="attempt 1 was superseded by attempt 2"):
        checkpoints.finish()
    assert not run_dir.checkpoints.exists()
    checkpoints.close()


FULL = """
import sys
from pathlib import Path
import torch
from dist_train.checkpoints.contents import Snapshot
from dist_train.checkpoints.storage import write
from dist_train.checkpoints.manifest import folder_of, good_checkpoints
from dist_train.checkpoints.contents import TrainerState
from dist_train.errors import CheckpointError
from dist_train.runs.directory import RunDir
run = RunDir(Path(sys.argv[1]))
def save(step, numbers):
    weights = torch.zeros(numbers)
    write(Snapshot(TrainerState(step=step), {"w": weights}, {"moments": weights}), folder_of(run, step), attempt=1)
save(1, 10_000)
for numbers in (10**6, 400_000):  # the weights do not fit; the weights fit, the moments do not
    try:
        save(2, numbers)
    except (OSError, CheckpointError) as error:
        names = sorted(path.name for path in run.checkpoints.iterdir())
        print("refused", [path.name for path in good_checkpoints(run)], names)
save(3, 200_000)
print([path.name for path in good_checkpoints(run)])
"""


@needs_mounts
def test_full_disk_keeps_good_checkpoint(tmp_path: Path) -> None:
    argv = ["unshare", "-m", "sh", "-euc", 'mount -t tmpfs -o size=2m tmpfs "$1"; exec "$0" -c "$2" "$1"']
    done = subprocess.run([*argv, sys.executable, str(tmp_path), FULL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first = ["step_00000001"]
    out = done.stdout.splitlines()
    assert out[:2] == [f"refused {first} {first}"] * 2
    assert out[2:] == ["['step_00000003', 'step_00000001']"]
    assert list(tmp_path.iterdir()) == []  # the mount exists only in the child's namespace
