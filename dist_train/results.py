"""Use a run afterwards: evaluate a checkpoint of it."""

from __future__ import annotations

import os
from pathlib import Path

from dist_train.checkpoint import find_checkpoint, load_weights, read_manifest
from dist_train.config_file import load_config
from dist_train.data import load_splits
from dist_train.data.evaluation_batches import evaluation_batches
from dist_train.distributed import World
from dist_train.environment import find_place
from dist_train.errors import CheckpointError, DataError
from dist_train.evaluate import evaluate
from dist_train.models import build_model
from dist_train.objective import Objective
from dist_train.run_dir import RunDir


def evaluate_run(path: Path, which: str, split: str) -> dict[str, float] | None:
    """Metrics of checkpoint `which` (last, best or a step) on `split` (val or test); None on ranks other than zero.

    Collective: every rank calls this with the same arguments.

    Raises:
        CheckpointError: no such run or checkpoint.
        DataError: the data set has no such split.
    """
    run_dir = RunDir(path)
    if not run_dir.config.is_file():
        raise CheckpointError(f"{path} has no config.yaml, so it is no run. Name a run directory.")
    config = load_config(str(run_dir.config))
    folder = find_checkpoint(run_dir, which)
    splits = load_splits(config.data, config.seed, find_place(os.environ).local_world_size)
    examples = splits.test if split == "test" else splits.val
    if examples is None:
        raise DataError(f"The data of {path} has no {split} split. Use --split {'val' if split == 'test' else 'test'}.")
    world = World.join(config)
    net = build_model(config.model, splits.known, config.seed)
    load_weights(net, folder)
    net.to(world.device)
    batches = evaluation_batches(examples, net, world, config)
    found = evaluate(net, batches, Objective(net, config.label_smoothing), world)
    world.leave()
    return {"step": read_manifest(folder)["step"], **(found or {})} if world.is_rank_zero else None
