"""A tiny net and its checkpoints, without data sets, launchers or ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_train.checkpoints.contents import Snapshot, TrainerState
from dist_train.checkpoints.manager import Checkpoints
from dist_train.checkpoints.manifest import folder_of
from dist_train.checkpoints.storage import write
from dist_train.config.batch_plan import BatchPlan
from dist_train.config.loading import parse_config
from dist_train.config.schema import Config
from dist_train.data.batches import Batch
from dist_train.distributed.world import World
from dist_train.runs.directory import RunDir
from dist_train.training.step.lr_schedule import LearningRate
from dist_train.training.step.train_step import Step

CONFIG = parse_config({"device": "cpu", "ema_decay": 0.9, "keep_last": 2, "keep_best": 1})


class Numbers:
    """Batches that depend only on the step."""

    examples: Any = None
    wait_s = 0.0
    on_gather: Callable[[torch.Tensor], object] = staticmethod(lambda indices: None)

    def at(self, step: int, micro_step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        inputs, targets = torch.randn(6, 4, generator=generator), torch.randint(3, (6,), generator=generator)
        return Batch(inputs, targets, torch.arange(6))


def new_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Linear(5, 3))


def new_step(world: World, seed: int, config: Config = CONFIG, make_net: Callable[[], nn.Module] = new_net) -> Step:
    torch.manual_seed(seed)
    net = make_net()
    return Step(config, world, net, Numbers(), BatchPlan(6, 1, 1), LearningRate(1e-2, 20, "cosine"))


def take(step: Step, first: int, count: int) -> None:
    for number in range(first, first + count):
        step.take(number)


def checkpoints_of(run_dir: RunDir, world: World, keep_every: int = 0, config: Config = CONFIG) -> Checkpoints:
    return Checkpoints(run_dir, world, config, keep_every)


def names(run_dir: RunDir) -> list[str]:
    return sorted(path.name for path in run_dir.checkpoints.iterdir() if not path.is_symlink())


def steps(run_dir: RunDir) -> list[int]:
    return [int(name.removeprefix("step_")) for name in names(run_dir)]


def write_at(run_dir: RunDir, step: int, accuracy: float | None = None) -> Path:
    """Write a checkpoint whose files all differ from those of other steps."""
    state = TrainerState(step=step)
    if accuracy is not None:
        state.record_evaluation({"val/loss": 1.0, "val/accuracy": accuracy}, min_delta=0.0)
    weights = {"weight": torch.full((20, 10), float(step)), "bias": torch.arange(10) + step}
    snapshot, folder = Snapshot(state, weights, {"window": torch.full((1, 3), float(step))}), folder_of(run_dir, step)
    write(snapshot, folder, attempt=1, run_id=run_dir.run_id)
    return folder
