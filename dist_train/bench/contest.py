"""Contestants in turns, each in a process of its own; ratios of pairs from the same round."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import comb

from dist_train.bench.harness import measure
from dist_train.bench.task import Found, Task
from dist_train.launch import output_of

# What people would use instead, and what it needs to be installed; at its best of 0 and 2 loader workers.
PEERS = {"dataloader": None, "accelerated": None, "lightning_trainer": "lightning"}
OURS, FLOOR = "dist_train", "resident"


@dataclass(frozen=True)
class Interval:
    """A median with the interval that holds the true one with at least 95 % (the whole range below six values)."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """From the order of the values alone, since times are not normally distributed."""
        ordered, n = sorted(values), len(values)
        outside = 0  # values that may be left out at each end: a binomial tail of at most 2.5 %
        while sum(comb(n, k) for k in range(outside + 1)) / 2**n <= 0.025:
            outside += 1
        outside = max(0, outside - 1)
        return cls(statistics.median(ordered), ordered[outside], ordered[n - 1 - outside])


Rounds = list[dict[str, Found]]  # one entry a round: contestant -> what it found


def contestants() -> list[str]:
    """Those whose packages are here."""
    return [OURS, FLOOR, *(name for name, needs in PEERS.items() if needs is None or find_spec(needs))]


def run_rounds(task: Task, names: Sequence[str], repetitions: int) -> Rounds:
    """Each round lets every contestant train once, so that a slow minute of the machine hits all of them."""
    return [{name: _run(task, name) for name in names} for _ in range(repetitions)]


def _run(task: Task, name: str) -> Found:
    if name == OURS:
        return measure(task)
    tasks = [replace(task, num_workers=workers) for workers in ((0, 2) if name in PEERS else (0,))]
    found: list[Found] = [
        json.loads(output_of(f"dist_train.bench.peers.{name}", each.to_argument()).splitlines()[-1]) for each in tasks
    ]
    return max(found, key=lambda each: each["samples_per_s"])


def ratios(rounds: Rounds, name: str, other: str) -> Interval:
    """How many times the samples per second of `other` the contestant `name` reached, pair by pair."""
    return Interval.of([each[name]["samples_per_s"] / each[other]["samples_per_s"] for each in rounds])


def best_peer(rounds: Rounds) -> str:
    """The peer with the highest median."""
    there = [name for name in PEERS if name in rounds[0]]
    return max(there, key=lambda name: statistics.median(each[name]["samples_per_s"] for each in rounds))
