"""A start says when one process would be faster than several."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from dist_train.distributed.shared_memory import SharedMemory
from dist_train.training.step import one_process
from support.ranks import run_on_ranks, train_here
from support.run_files import assert_bit_identical
from support.trainings import MNIST

SAID = r"one process may be faster: forward and backward .* ([\d.]+) ms in one .*, and ([\d.]+) ms in these 2"
TINY: dict[str, Any] = {
    **MNIST, "model": {"name": "mlp"}, "global_batch_size": 2, "train_for": "2 steps", "eval_every": 0,
}  # fmt: skip
DELAY_S = 0.3
ANY_S = 1e9


def train(settings: dict[str, Any], run_dir: Path, longest_pass_s: float) -> None:
    """Train with an exchange that is slow on any machine. `longest_pass_s`: longer passes are not timed."""
    average = SharedMemory.average

    def slow(memory: SharedMemory, values: Tensor) -> None:
        time.sleep(DELAY_S)
        average(memory, values)

    SharedMemory.average = slow  # type: ignore[assignment, method-assign]
    one_process.SHORT_PASS_S = longest_pass_s
    train_here(settings, run_dir)


def said(run_dir: Path) -> re.Match[str] | None:
    return re.search(SAID, (run_dir / "logs/rank_00000.log").read_text())


def test_said_with_both_times_and_without_effect(tmp_path: Path) -> None:
    for name, longest_pass_s in (("asked", ANY_S), ("not asked", 0.0)):
        run_on_ranks(train, TINY, tmp_path / name, longest_pass_s, world_size=2)
    found = said(tmp_path / "asked")
    assert found
    assert 0 < float(found[1]) < 1000 * DELAY_S < float(found[2])
    assert not said(tmp_path / "not asked")
    assert_bit_identical(tmp_path / "asked", tmp_path / "not asked")


@pytest.mark.parametrize(
    "other",
    [
        {
            "model": {"name": "support.user_nets:Gated", "args": {"slow_s": 0.0}}
        },  # not ours: its forward may do anything
        {"per_device_batch_size": 1, "global_batch_size": 4},
    ],
)
def test_not_asked(other: dict[str, Any], tmp_path: Path) -> None:
    run_on_ranks(train, TINY | other, tmp_path, ANY_S, world_size=2)
    assert not said(tmp_path)
