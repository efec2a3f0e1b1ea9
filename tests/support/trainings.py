"""What tests train."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from support.patience import wait_until
from support.processes import DIST_TRAIN
from support.run_files import last_checkpoint
from support.user_nets import OPEN

# A few seconds of real MNIST.
SETTINGS = shlex.split("-c smoke -q -o log_every=1 -o eval_every=0 -o final_train_eval=false -o optimizer.lr=1e-3")

# For what must not depend on how a batch is divided.
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
# (world size, at most per device): every rank count, with and without micro-batches
DIVISIONS = [(1, 16), (2, 48), (2, 12), (3, 32)]


STEPS = 200


def train(*settings: str, nproc: int | None = 2) -> list[str]:
    """A training to be disturbed, in the current folder, as `runs/r`: held until `let_go`, or for a minute.

    Without `nproc` for `run_forked`.
    """
    own = [
        "model.name=support.user_nets:Gated",
        "model.args.slow_s=0.3",
        f"train_for={STEPS} steps",
        "log_every=4",
        "save_every=8 steps",
    ]
    processes = [f"--nproc={nproc}"] if nproc else []
    return [*DIST_TRAIN, "train", *SETTINGS, *own, *settings, "--run-name", "r", *processes]


def let_go(folder: Path) -> None:
    """Trainings in this folder, those that go on and those to come, are held no longer."""
    (folder / OPEN).touch()


def save(run_dir: Path) -> int:
    """Ask for the first checkpoint and wait for it: its step."""
    (run_dir / "SAVE").touch()
    wait_until(lambda: any(run_dir.glob("checkpoints/step_*/manifest.json")), "save")
    return int(last_checkpoint(run_dir).name.removeprefix("step_"))
