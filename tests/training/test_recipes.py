"""Schedules and groups of a recipe: the same for any division of the batch, and resumed as if never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dist_train.cli import main
from support.ranks import train_on_ranks
from support.run_files import assert_bit_identical, largest_difference, metrics, train_losses, weights
from support.trainings import MNIST

STEPS, CHANGE = 8, 4
RECIPE = MNIST | {
    "data": MNIST["data"] | {"name": "support.user_sets:mnist_part"},
    "dtype": "float64", "step_mode": "eager", "train_for": f"{STEPS} steps", "log_every": 1, "eval_every": 0,
}  # fmt: skip
STEP = {"name": "step", "milestones": [f"{CHANGE} steps"]}
RECIPES: dict[str, dict[str, Any]] = {
    "step": {"schedule": STEP},
    "groups": {
        "schedule": STEP,
        "optimizer": {
            "name": "adamw", "lr": 1e-3, "weight_decay": 0.05, "no_decay": "1d", "layer_decay": 0.75,
            "groups": [{"match": "fc2", "lr_factor": 10, "weight_decay": 0}],
        },
    },
    "own-schedule": {"schedule": {"name": "support.user_optimizers:halved"}},
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_equal_for_every_division_and_resume(name: str, tmp_path: Path) -> None:
    """On one process stopped where lr changes, to the bit; begun on two in micro-batches and resumed on three."""
    settings = RECIPE | RECIPES[name]
    for run, world_sizes, stops, per_device in (
        ("whole", [1], [None], 96),
        ("parts", [1, 1], [CHANGE, None], 96),
        ("divided", [2, 3], [CHANGE, None], 12),
    ):
        for world_size, stop_after in zip(world_sizes, stops, strict=True):
            train_on_ranks(settings | {"per_device_batch_size": per_device}, tmp_path / run, world_size, stop_after)
    assert_bit_identical(tmp_path / "parts", tmp_path / "whole")
    assert len(train_losses(tmp_path / "divided")) == STEPS
    assert train_losses(tmp_path / "divided") == pytest.approx(train_losses(tmp_path / "whole"), rel=1e-10)
    assert largest_difference(weights(tmp_path / "divided"), weights(tmp_path / "whole")) < 1e-10
    rates = [line["train/lr"] for line in metrics(tmp_path / "whole") if "train/lr" in line]
    assert len(set(rates)) > 1


@pytest.mark.parametrize("setting", ["schedule.name=nowhere:fall"])
def test_missing_code_is_refused_before_processes_start(setting: str) -> None:
    done = CliRunner().invoke(main, ["config", "validate", "-c", "smoke", setting], prog_name="dist-train")
    assert done.exit_code == 1
    assert "nowhere:" in done.stderr
    assert "no module nowhere" in done.stderr
