"""A checkpoint is complete or absent, and the last good one is never lost (promise 4 in README.md)."""

from __future__ import annotations

import copy
import pickle
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_train.checkpoints import manager as module
from dist_train.checkpoints.contents import MODEL, STATE, TRAINING, Snapshot, TrainerState
from dist_train.checkpoints.manifest import find_damage, folder_of
from dist_train.checkpoints.storage import load_weights, restore, write
from dist_train.config.loading import parse_config
from dist_train.distributed.world import World
from dist_train.errors import CheckpointError, TrainingDiverged
from dist_train.runs.directory import RunDir
from support.run_files import assert_equal
from support.tiny_runs import checkpoints_of, names, new_net, new_step, steps, take, write_at

# --- restoring ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [{}, {"ema_decay": None}, {"optimizer": {"name": "sgd", "momentum": 0.9}}], ids=str)
def test_restored_state_equals_saved_state(extra: dict[str, Any], world: World, run_dir: RunDir) -> None:
    config = parse_config({"device": "cpu", "ema_decay": 0.9, **extra})
    step = new_step(world, seed=0, config=config)
    take(step, 0, 4)
    state = TrainerState(step=4, logged_step=3, evaluation_pending=True, train_s=1 / 3)
    state.record_evaluation({"val/loss": 0.1, "val/accuracy": 2 / 3}, min_delta=0.0)
    checkpoints = checkpoints_of(run_dir, world, config=config)
    checkpoints.save(state, step)
    checkpoints.finish()
    other = new_step(world, seed=1, config=config)
    assert checkpoints.restore_latest(other) == state
    assert_equal(other.state_dict(), step.state_dict())
    take(step, 4, 3)
    take(other, 4, 3)
    assert_equal(other.state_dict(), step.state_dict())
    load_weights(new_net(), folder_of(run_dir, 4))
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not fit Linear: "):
        load_weights(nn.Linear(2, 2), folder_of(run_dir, 4))
    checkpoints.close()


class Versioned(nn.Linear):
    """A layer whose version 3 negates weights of version 2 and rejects weights without a version."""

    _version = 3

    def __init__(self) -> None:
        super().__init__(4, 3)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *more: Any) -> None:
        version = local_metadata.get("version")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not known")
        if version == 2:
            state_dict[f"{prefix}weight"] = -state_dict[f"{prefix}weight"]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *more)


@pytest.mark.parametrize("kind", ["of today", "of an older library", "of older dist_train"])
def test_net_loads_state_with_its_version(
    kind: str, world: World, run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds for trained weights, their average, and weights loaded without a training."""

    def make() -> nn.Module:
        return nn.Sequential(Versioned())

    step, state = new_step(world, seed=0, make_net=make), TrainerState(step=2)
    take(step, 0, 2)
    checkpoints = checkpoints_of(run_dir, world)
    with monkeypatch.context() as patch:
        if kind == "of an older library":
            patch.setattr(Versioned, "_version", 2)
        if kind == "of older dist_train":
            patch.setattr("dist_train.checkpoints.storage.header_of", lambda weights: {})
            patch.setattr("dist_train.checkpoints.manager.with_versions_of", lambda copied, weights: copied)
        checkpoints.save(state, step)
        checkpoints.finish()
    other, bare = new_step(world, seed=1, make_net=make), make()
    assert checkpoints.restore_latest(other) == state
    load_weights(bare, folder_of(run_dir, 2))
    sign = -1 if kind == "of an older library" else 1
    assert other.ema is not None
    assert step.ema is not None
    for actual, expected in ((other.net, step.net), (other.ema.module, step.ema.module), (bare, step.ema.module)):
        assert torch.equal(actual.get_parameter("0.weight"), sign * expected.get_parameter("0.weight"))
    checkpoints.close()


def test_training_continues_while_snapshot_is_written(
    world: World, run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()

    def wait_and_write(*args: Any, **kwargs: Any) -> None:
        go.wait(30)
        write(*args, **kwargs)

    monkeypatch.setattr(module, "write", wait_and_write)
    step, state = new_step(world, seed=0), TrainerState(step=2)
    take(step, 0, 2)
    checkpoints = checkpoints_of(run_dir, world)
    checkpoints.save(state, step)
    before = copy.deepcopy(step.state_dict())
    take(step, 2, 2)
    state.step = 4
    go.set()
    checkpoints.finish()
    other = new_step(world, seed=1)
    assert checkpoints.restore_latest(other) == TrainerState(step=2)
    assert_equal(other.state_dict(), before)
    checkpoints.close()


def test_without_checkpoints_nothing_is_restored(world: World, run_dir: RunDir) -> None:
    assert checkpoints_of(run_dir, world).restore_latest(new_step(world, 0)) is None


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_loading_executes_no_code(world: World, run_dir: RunDir, tmp_path: Path) -> None:
    """A malicious checkpoint with correct checksums."""
    bomb = Bomb(tmp_path / "exploded")
    write(Snapshot(TrainerState(step=1), {"w": torch.ones(1)}, {"window": bomb}), folder_of(run_dir, 1), attempt=1)
    assert find_damage(folder_of(run_dir, 1)) == ""
    with pytest.raises(CheckpointError, match="step_00000001 cannot be read: "):
        restore(folder_of(run_dir, 1), new_step(world, 0))
    assert not bomb.path.exists()
    pickle.loads(pickle.dumps(bomb))  # a plain unpickle runs it
    assert bomb.path.exists()


@pytest.mark.parametrize("name", [MODEL, TRAINING, STATE])
def test_unreadable_file_raises_checkpoint_error(name: str, world: World, run_dir: RunDir) -> None:
    folder = write_at(run_dir, 1)
    (folder / name).write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="step_00000001 cannot be read: "):
        restore(folder, new_step(world, 0))
    if name == MODEL:
        with pytest.raises(CheckpointError, match=r"model\.safetensors does not fit Linear: "):
            load_weights(nn.Linear(2, 2), folder)


# --- pruning and links -----------------------------------------------------------------------------------------------


def test_last_best_and_periodic_checkpoints_are_kept(world: World, run_dir: RunDir) -> None:
    checkpoints, step = checkpoints_of(run_dir, world, keep_every=4), new_step(world, 0)
    state = TrainerState()
    kept = []
    for number, accuracy in enumerate([0.1, 0.5, 0.9, 0.2, 0.3, 0.95, 0.4, None, 0.6], start=1):
        state.step = number
        if accuracy is not None:
            state.record_evaluation({"val/loss": 1.0, "val/accuracy": accuracy}, min_delta=0.0)
        checkpoints.save(state, step)
        checkpoints.finish()
        kept.append(steps(run_dir))
    assert kept == [
        [1], [1, 2], [2, 3], [3, 4], [3, 4, 5], [4, 5, 6], [4, 6, 7], [4, 6, 7, 8], [4, 6, 8, 9],
    ]  # fmt: skip
    links = {name: (run_dir.checkpoints / name).resolve() for name in ("last", "best")}
    assert links == {"last": folder_of(run_dir, 9), "best": folder_of(run_dir, 6)}
    checkpoints.close()


def test_copied_checkpoint_does_not_count(world: World, run_dir: RunDir) -> None:
    """Under any name: only a folder whose name agrees with its manifest counts when pruning."""
    config = parse_config({"device": "cpu", "ema_decay": 0.9, "keep_last": 1, "keep_best": 0})
    checkpoints, step = checkpoints_of(run_dir, world, config=config), new_step(world, 0)
    for number in (1, 2):
        checkpoints.save(TrainerState(step=number), step)
        checkpoints.finish()
        if number == 1:
            for name in ("step_backup", "step_00000099"):
                shutil.copytree(folder_of(run_dir, 1), run_dir.checkpoints / name)
    assert names(run_dir) == ["step_00000002", "step_00000099", "step_backup"]
    assert checkpoints.restore_latest(new_step(world, 1)) == TrainerState(step=2)
    assert names(run_dir) == ["damaged_step_00000099", "step_00000002", "step_backup"]
    checkpoints.close()


@pytest.mark.parametrize("linking", ["it is a folder", "no links here"])
def test_failed_link_does_not_fail_save(
    linking: str,
    world: World,
    run_dir: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In a copy that followed links, `last` and `best` are folders; some file systems do not support links."""

    def refuse(*_: object) -> None:
        raise OSError(95, linking)

    checkpoints, step = checkpoints_of(run_dir, world), new_step(world, 0)
    if linking == "no links here":
        monkeypatch.setattr(Path, "symlink_to", refuse)
    else:
        write_at(run_dir, 1)
        folder_of(run_dir, 1).rename(run_dir.checkpoints / "last")
    for number in (2, 3):
        checkpoints.save(TrainerState(step=number), step)
        checkpoints.finish()
    (warning,) = caplog.messages
    assert f"{run_dir.checkpoints / 'last'} is not a link to step_00000002: {linking}" in warning
    assert {path.name for path in run_dir.checkpoints.iterdir()} - {"last"} == {"step_00000002", "step_00000003"}
    checkpoints.close()


@pytest.mark.parametrize("poison", ["weight", "buffer", "window"])
def test_nonfinite_state_is_never_saved(poison: str, world: World, run_dir: RunDir) -> None:
    checkpoints, step = checkpoints_of(run_dir, world), new_step(world, 0)
    checkpoints.save(TrainerState(step=1), step)
    checkpoints.finish()
    with torch.no_grad():
        {"weight": next(step.net.parameters()), "buffer": next(step.net.buffers()), "window": step.window.sums}[
            poison
        ].flatten()[-1] = float("inf" if poison == "buffer" else "nan")
    with pytest.raises(TrainingDiverged, match=r"between step 2 and 3.*step_00000001\. Lower optimizer\.lr"):
        checkpoints.save(TrainerState(step=3, logged_step=1), step)
    checkpoints.finish()
    assert steps(run_dir) == [1]
    checkpoints.close()
