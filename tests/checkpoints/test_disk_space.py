"""The room of checkpoints is known before the first is written, and asked for where a run starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_train.checkpoints.contents import TrainerState
from dist_train.checkpoints.disk_space import CheckpointSize, check_room
from dist_train.checkpoints.manifest import folder_of
from dist_train.config.loading import load_config, parse_config
from dist_train.distributed.world import World
from dist_train.errors import RunDirError
from dist_train.runs.directory import RunDir
from dist_train.tools.doctor import examine
from dist_train.tools.simulate import simulate
from support.tiny_runs import checkpoints_of, new_step, take, write_at


def new_net() -> nn.Module:
    """Parameters, buffers, frozen parameters and tied ones: 300 to 600 kB each."""
    frozen, tied = nn.Linear(20_000, 4), nn.Linear(300, 300)
    return nn.Sequential(
        nn.Linear(4, 20_000), nn.BatchNorm1d(20_000), frozen.requires_grad_(False), nn.Linear(4, 300), tied, tied,
        nn.Linear(300, 3),
    )  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ema_decay": 0.9},
        {"optimizer": {"name": "adamw", "amsgrad": True}},
        {"optimizer": {"name": "sgd"}},
        {"optimizer": {"name": "sgd", "momentum": 0.9}, "ema_decay": 0.9},
        {"optimizer": {"name": "adadelta"}},
        {"optimizer": {"name": "rmsprop"}},
        {"optimizer": {"name": "rmsprop", "momentum": 0.9, "centered": True}},
    ],
    ids=str,
)
def test_checkpoint_size_is_that_of_its_files(settings: dict[str, Any], world: World, run_dir: RunDir) -> None:
    config = parse_config({"device": "cpu", **settings})
    step = new_step(world, seed=0, config=config, make_net=new_net)
    expected = CheckpointSize.of(step.net, config).total
    take(step, 0, 1)
    checkpoints = checkpoints_of(run_dir, world, config=config)
    checkpoints.save(TrainerState(step=1), step)
    checkpoints.finish()
    checkpoints.close()
    written = sum(path.stat().st_size for path in folder_of(run_dir, 1).iterdir())
    assert 0 < written - expected < 40_000


def test_start_needs_room_for_two_checkpoints_resume_for_one(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    size = CheckpointSize(weights=2**20, optimizer=2**21)

    def leave_free(free: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": free}))

    leave_free(6 * 2**20 - 1)
    expected = (
        r"need 2 x 3\.0 MiB \(1\.0 weights \+ 2\.0 optimizer state\) = 6\.0 MiB, .* has 6\.0 MiB free\. Make room"
    )
    with pytest.raises(RunDirError, match=expected):
        check_room(run_dir, size)
    for step in (1, 2, 3):
        write_at(run_dir, step)
        leave_free(3 * 2**20)
        check_room(run_dir, size)
        leave_free(3 * 2**20 - 1)
        with pytest.raises(RunDirError, match=r"need 1 x 3\.0 MiB"):
            check_room(run_dir, size)


@pytest.mark.parametrize(
    ("dtype", "size", "memory"),
    [("float32", "2.3 MiB (0.8 weights + 1.6 optimizer state)", 3.1), ("float64", "4.7 MiB (1.6 ", 6.2)],
)
def test_doctor_and_simulation_know_the_dtype(dtype: str, size: str, memory: float, tmp_path: Path) -> None:
    """Memory holds gradients too, and the files do not."""
    config = load_config("smoke", ["model.args.hidden=256", f"dtype={dtype}"])
    said = {each.name: each.result for each in examine(config, tmp_path)}
    assert f"203,530 parameters, a checkpoint takes {size}" in said["net"]
    assert [*simulate(config, 2)][-1].startswith(f"memory per process: {memory} MiB of weights, gradients, optimizer ")
    assert torch.get_default_dtype() == torch.float32
