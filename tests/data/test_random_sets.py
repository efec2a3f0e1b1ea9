"""Randomly drawn user sets and nets: a run resumed with other loader workers ends as an uninterrupted run.

`make sets` tests many of them, each run of the tests a few.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from support.ranks import train_on_ranks
from support.run_files import assert_bit_identical, metrics

DRAWN, BY_DEFAULT = 60, 3


def drawn(seed: int, folder: Path) -> tuple[dict[str, Any], int, list[int]]:
    """Draw settings, the step to stop after, and the loader workers of the three starts."""
    draw = random.Random(seed)
    data = {
        "length": draw.randrange(24, 90),
        "form": draw.choice(["tensor", "array", "mapping", "named tuple"]),
        "draws": draw.sample(["python", "numpy", "torch"], draw.randrange(4)),
        "folder": str(folder) if draw.random() < 0.5 else None,
    }
    settings = {
        "data": {"name": "support.user_sets:Odd", "args": data, "val_examples": draw.choice([0, 0, 7])},
        "model": {"name": "support.user_nets:ForOdd", "args": {"in_place": draw.random() < 0.5}},
        "global_batch_size": 12, "per_device_batch_size": draw.choice([2, 3, 6]), "seed": seed, "device": "cpu",
        "train_for": "9 steps", "log_every": 1, "eval_every": "4 steps", "final_train_eval": False,
        "ema_decay": draw.choice([None, 0.9]), "optimizer": {"lr": 1e-2},
    }  # fmt: skip
    return settings, draw.randrange(1, 8), [draw.choice([0, 1, 3]) for _ in range(3)]


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[] if seed < BY_DEFAULT else pytest.mark.full) for seed in range(DRAWN)]
)
def test_random_sets_train_and_resume_exactly(seed: int, tmp_path: Path) -> None:
    settings, stop_after, workers = drawn(seed, tmp_path)
    world_size = 1 + seed % 2

    def train(name: str, workers: int, stop_after: int | None = None) -> None:
        data = settings["data"] | {"num_workers": workers}
        train_on_ranks(settings | {"data": data}, tmp_path / name, world_size, stop_after)

    train("whole", workers[0])
    train("resumed", workers[1], stop_after)
    train("resumed", workers[2])
    assert_bit_identical(tmp_path / "resumed", tmp_path / "whole")
    seen = json.loads((tmp_path / "resumed/result.json").read_text())["test/seen"]
    assert seen == 17
    assert {line["audit/duplicate"] for line in metrics(tmp_path / "resumed") if "audit/unique" in line} <= {0}
