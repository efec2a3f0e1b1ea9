"""The benchmark's statistics and its report; the contestants themselves run in `make bench`, not here."""

from __future__ import annotations

import json
from math import comb
from pathlib import Path

import pytest

from dist_train.bench.contest import Interval, Rounds, best_peer, ratios
from dist_train.bench.report import machine, markdown, write
from dist_train.bench.task import Task


@pytest.mark.parametrize("n", [1, 3, 5, 6, 9, 20, 30])
def test_the_interval_holds_the_true_median_with_95_percent(n: int) -> None:
    """The chance that it does not: that too many values fall on one side. The next narrower interval misses 95 %."""
    found = Interval.of([float(value) for value in range(n)])
    left_out = int(found.low)
    assert found.high == n - 1 - left_out

    def misses(outside: int) -> float:
        return float(2 * sum(comb(n, k) for k in range(outside + 1)) / 2**n)

    assert misses(left_out) <= 0.05 or left_out == 0
    assert misses(left_out + 1) > 0.05


def rounds() -> Rounds:
    speeds = {"dist_train": [200.0, 100.0, 330.0], "dataloader": [20.0, 5.0, 30.0], "accelerated": [10.0, 25.0, 11.0]}
    return [
        {name: {"samples_per_s": own[k], "accuracy": 0.9, "peak_memory_gib": 1.0} for name, own in speeds.items()}
        for k in range(3)
    ]


def test_ratios_are_of_pairs_from_one_round() -> None:
    assert ratios(rounds(), "dist_train", "dataloader") == Interval(11.0, 10.0, 20.0)
    assert best_peer(rounds()) == "dataloader"


def test_the_report(tmp_path: Path) -> None:
    contests = [(Task(net="mlp"), rounds())]
    assert "| mlp | fp32 | dataloader (best peer) | 20 | 11.00x (10.00 to 20.00) | 90.00 % |" in markdown(
        contests, machine()
    )
    write(contests, tmp_path)
    assert json.loads((tmp_path / "speed.json").read_text())["contests"][0]["rounds"] == rounds()
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
