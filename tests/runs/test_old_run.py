"""Resuming a run directory of an older version (commit 2b6bb42, stopped at step 3 of 6)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_train.config.loading import load_config
from support.processes import DIST_TRAIN, ROOT
from support.ranks import run_forked
from support.run_files import train_losses, weights

OLD = ROOT / "tests/old_run"


def test_old_run_resumes_like_uninterrupted_run(tmp_path: Path) -> None:
    """Equal within rounding, as another processor may have written it. Bit-identical on the same one (checked once)."""
    shutil.copytree(OLD / "run", tmp_path / "runs/r")
    done = run_forked([*DIST_TRAIN, "train", "-c", "runs/r/config.yaml", "--run-name", "r"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resumed at step 3 of 6" in done.stdout
    for name, expected in load_file(OLD / "weights_at_step_6.safetensors").items():
        torch.testing.assert_close(weights(tmp_path / "runs/r")[name], expected, rtol=1e-5, atol=1e-6)
    lines = [json.loads(line) for line in (OLD / "metrics_of_all_steps.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert train_losses(tmp_path / "runs/r") == pytest.approx(losses, rel=1e-5)
    assert json.loads((tmp_path / "runs/r/run.json").read_text())["data_identity"]


def test_settings_of_old_run_are_still_valid() -> None:
    assert load_config(str(OLD / "run/config.yaml")).model.args == {"hidden": 2}
