"""The compiled update of several micro-batches and processes: the numbers of one, and a resume to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_train.runs.directory import RunDir
from support.ranks import train_on_ranks
from support.run_files import assert_bit_identical, largest_difference, train_losses, weights
from support.trainings import MNIST

# Weights of examples differ from shard to shard, so they have to be added up before the gradients are divided by them.
SETTINGS: dict[str, Any] = {
    **MNIST, "model": {"name": "mlp"}, "step_mode": "compile", "dtype": "float64", "train_for": "8 steps",
    "log_every": 1, "eval_every": 0, "save_every": "4 steps", "max_grad_norm": 0.5, "ema_decay": 0.9,
    "class_weights": [1, 2, 3, 4, 5, 6, 7, 8, 9, 0], "ignore_index": 3,
}  # fmt: skip


@pytest.mark.timeout(1800)
def test_divisions_and_resume(tmp_path: Path) -> None:
    """In float64. Compiled, a few operations round to fp32, so all are compared with one compiled process."""
    train_on_ranks(SETTINGS, tmp_path / "whole")
    for world_size, per_device in ((1, 48), (2, 24)):
        run_dir = tmp_path / f"{world_size}"
        settings = SETTINGS | {"per_device_batch_size": per_device}
        train_on_ranks(settings, run_dir, world_size)
        assert RunDir(run_dir).read_provenance()["step_mode"] == "compile"
        assert largest_difference(weights(run_dir), weights(tmp_path / "whole")) < 1e-10
        assert train_losses(run_dir) == pytest.approx(train_losses(tmp_path / "whole"), rel=1e-10)
    train_on_ranks(settings, tmp_path / "stopped", 2, stop_after=3)
    train_on_ranks(settings, tmp_path / "stopped", 2)
    assert_bit_identical(tmp_path / "stopped", run_dir)
