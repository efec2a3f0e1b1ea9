"""A training that is long enough to be disturbed: some seconds."""

from __future__ import annotations

from test_launch import DIST_TRAIN, SETTINGS

STEPS = 1500


def train(*settings: str, nproc: int = 2) -> list[str]:
    """In the current folder, as `runs/r`."""
    own = ["model.name=user_nets:Slow", "model.args.slow_s=0.004", f"train_for={STEPS} steps", "log_every=10",
           "save_every=50 steps"]  # fmt: skip
    return [*DIST_TRAIN, "train", *SETTINGS, *own, *settings, "--run-name", "r", f"--nproc={nproc}"]
