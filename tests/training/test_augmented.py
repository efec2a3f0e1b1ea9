"""Runs on augmented and mixed images: the same for any division, and resumed as if never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.divisions import check_every_division
from support.processes import DIST_TRAIN
from support.ranks import run_forked
from support.run_files import metrics
from support.trainings import MNIST

STEPS = 14  # into the second epoch of 10
RUN: dict[str, Any] = MNIST | {
    "dtype": "float64", "step_mode": "eager", "train_for": f"{STEPS} steps", "log_every": 1, "eval_every": 0,
    "label_smoothing": 0.1,
}  # fmt: skip
DATA: dict[str, Any] = MNIST["data"] | {"name": "support.user_sets:mnist_part"}  # 960 examples
ALL = {"scale": [0.5, 1], "flip": "alternate", "brightness": 0.2, "contrast": 0.2, "cutout": 8, "mixup_alpha": 0.4,
       "cutmix_alpha": 1.0}  # fmt: skip


@pytest.mark.parametrize(
    "data",
    [
        {"augment": ALL},
        {"augment": ALL, "resident": False, "sampling": "balanced"},
        {"transforms": ["RandomInvert", {"RandomCrop": {"padding": 2}}], "augment": {"mixup_alpha": 0.4}},
    ],
    ids=["resident", "streamed", "transforms"],
)
def test_run_is_equal_for_every_division_and_resume(data: dict[str, Any], tmp_path: Path) -> None:
    """On one process stopped in mid-epoch, to the bit; on two in micro-batches and resumed on three, within 1e-10."""
    settings = RUN | {"data": DATA | data}
    whole = check_every_division(settings, tmp_path, STEPS, 7, [(2, 7), (3, 10), (1, None)])
    audits = [line for line in metrics(whole) if "audit/unique" in line]
    assert [line["audit/unique"] + line["audit/duplicate"] for line in audits] == [960, 4 * 96]


def test_mixing_is_refused_where_the_net_has_its_own_loss(tmp_path: Path) -> None:
    settings = ["model.name=support.user_nets:OwnLoss", "data.augment.mixup_alpha=0.2", "--fast-dev-run"]
    done = run_forked([*DIST_TRAIN, "train", "-c", "smoke", *settings], tmp_path)
    assert done.returncode == 2, done.stderr
    assert "data.augment.mixup_alpha and cutmix_alpha give an image two labels, and OwnLoss.loss takes" in done.stderr
