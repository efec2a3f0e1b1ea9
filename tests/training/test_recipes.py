"""Schedules and groups of a recipe: the same for any division of the batch, and resumed as if never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dist_train.cli import main
from support.divisions import check_every_division
from support.run_files import metrics
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
    whole = check_every_division(settings, tmp_path, STEPS, CHANGE, [(2, CHANGE), (3, None)])
    rates = [line["train/lr"] for line in metrics(whole) if "train/lr" in line]
    assert len(set(rates)) > 1


@pytest.mark.parametrize("setting", ["schedule.name=nowhere:fall"])
def test_missing_code_is_refused_before_processes_start(setting: str) -> None:
    done = CliRunner().invoke(main, ["config", "validate", "-c", "smoke", setting], prog_name="dist-train")
    assert done.exit_code == 1
    assert "nowhere:" in done.stderr
    assert "no module nowhere" in done.stderr
