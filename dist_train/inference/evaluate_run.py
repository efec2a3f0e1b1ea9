"""Evaluation of a checkpoint."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_train.checkpoints.manifest import read_manifest
from dist_train.checkpoints.saved_net import SavedNet
from dist_train.checkpoints.storage import load_weights
from dist_train.data.evaluation_batches import evaluation_batches
from dist_train.data.splits import load_splits
from dist_train.distributed.process_info import detect_process
from dist_train.distributed.world import World
from dist_train.errors import DataError
from dist_train.models.registry import build_model
from dist_train.models.tasks.confusion import Confusion, class_names
from dist_train.models.tasks.losses import loss_for
from dist_train.models.tasks.objective import Objective
from dist_train.models.tasks.split_metrics import split_metrics
from dist_train.training.evaluate import evaluate
from dist_train.training.provenance import changed_data

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationResult:
    step: int
    metrics: dict[str, float]
    confusion: Tensor | None  # int64 [K, K]: counts by class (row) and predicted class (column)
    classes: list[str]  # [K]


def evaluate_run(path: Path, which: str, split: str) -> EvaluationResult | None:
    """Evaluate checkpoint `which` (last, best or a step) on `split` (val or test); None on ranks other than zero.

    Collective: every rank calls this with the same arguments.

    Raises:
        CheckpointError: the run or checkpoint does not exist.
        DataError: the data set has no such split.
    """
    saved = SavedNet.find(path, which)
    config, run_dir, folder = saved.config, saved.run_dir, saved.folder
    # Only training needs these, and a single pass does not pay for keeping a set in memory.
    unused: dict[str, Any] = {"sample_weights": None, "transforms": []}
    data = config.data.model_copy(update=unused | ({"resident": None} if config.data.resident else {}))
    splits = load_splits(data, config.seed, detect_process(os.environ).local_world_size)
    examples = splits.test if split == "test" else splits.val
    if examples is None:
        raise DataError(f"The data of {path} has no {split} split. Use --split {'val' if split == 'test' else 'test'}.")
    precision = run_dir.precision
    if precision == "fp16" and not torch.cuda.is_available():
        precision = "no"  # allow evaluation of fp16 runs without a GPU
    # Pass it as a setting, which overrides what a launcher exports.
    world = World.join(config.model_copy(update={"mixed_precision": precision}), precision)
    if world.is_rank_zero:
        for change in changed_data(run_dir.read_provenance(), splits.fingerprints):
            _log.warning("%s These metrics are not comparable with the run's own.", change)
        if which == "best" and split == "test" and splits.choice_by_test:
            _log.warning("The best checkpoint was chosen by %s.", splits.choice_by_test)
    net = build_model(config.model, splits.input_spec, config.seed)
    load_weights(net, folder)
    net.to(world.device)
    batches = evaluation_batches(examples, net, world, config)
    world.set_timeout(config.stall_timeout_s)
    confusion = Confusion()
    objective = Objective(net, loss_for(net, config, splits, world.device))
    metrics = split_metrics(config, batches.num_examples, world.device)
    values = evaluate(net, batches, objective, world, confusion=confusion, metrics=metrics)
    counts = confusion.total(world)
    world.leave()
    if not world.is_rank_zero or values is None:
        return None
    classes = class_names(splits.description["classes"], 0 if counts is None else len(counts))
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    return EvaluationResult(read_manifest(folder)["step"], finite, counts, classes)
