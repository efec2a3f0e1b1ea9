"""Settings and helpers of trainings in tests."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from support.once import made_once
from support.patience import wait_until
from support.processes import DIST_TRAIN
from support.ranks import run_forked
from support.run_files import last_checkpoint
from support.user_nets import OPEN

# A few seconds of training on MNIST.
SETTINGS = shlex.split("-c smoke -q -o log_every=1 -o eval_every=0 -o final_train_eval=false -o optimizer.lr=1e-3")

# For tests that the division of a batch does not change results.
NETS: dict[str, dict[str, Any]] = {
    "mlp": {"name": "mlp"},
    "guide": {"name": "guide"},
    "bks": {"name": "bks", "args": {"dropout": 0.0}},
    "conv": {"name": "conv"},
    "fast": {"name": "fast"},
}
MNIST: dict[str, Any] = {
    "global_batch_size": 96,
    "final_train_eval": False,
    "optimizer": {"lr": 1e-3},
    "data": {"normalize": {"mean": [0.1307], "std": [0.3081]}},
}
# (world size, per_device_batch_size): every world size, with and without micro-batches
DIVISIONS = [(1, 16), (2, 48), (2, 12), (3, 32)]


STEPS = 200
# A training to be disturbed: held until `release`, or for a minute.
HELD = [
    *SETTINGS, "model.name=support.user_nets:Gated", "model.args.slow_s=0.3", f"train_for={STEPS} steps",
    "log_every=4", "save_every=8 steps",
]  # fmt: skip


def train(*settings: str, nproc: int | None = 2) -> list[str]:
    """Return the command of a HELD training in the current folder, as `runs/r`. `nproc`: None for no launcher."""
    launcher = [] if nproc is None else [f"--nproc={nproc}"]
    return [*DIST_TRAIN, "train", *HELD, *settings, "--run-name=r", *launcher]


def trained_once(
    tmp_path_factory: pytest.TempPathFactory, name: str, settings: Sequence[str], world_size: int = 1, **env: str
) -> Path:
    """Return the directory of an undisturbed training on forked ranks, made once for all workers."""

    def make(folder: Path) -> None:
        release(folder)
        done = run_forked([*DIST_TRAIN, "train", *settings, "--run-name=r"], folder, world_size, **env)
        assert done.returncode == 0, done.stderr

    return made_once(tmp_path_factory, name, make) / "runs/r"


def release(folder: Path) -> None:
    """Release current and future trainings in this folder."""
    (folder / OPEN).touch()


def save(run_dir: Path) -> int:
    """Request the first checkpoint, wait for it and return its step."""
    (run_dir / "SAVE").touch()
    wait_until(lambda: any(run_dir.glob("checkpoints/step_*/manifest.json")), "save")
    return int(last_checkpoint(run_dir).name.removeprefix("step_"))
