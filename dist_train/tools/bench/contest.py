"""Speed: contestants take turns, each in its own process; ratios pair values of the same round."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import count
from typing import Any

from dist_train.launch.subprocesses import output_of
from dist_train.tools.bench.interval import Interval
from dist_train.tools.bench.ours import measure
from dist_train.tools.bench.task import Found, Task

# The alternatives, and the package each needs; each with the better of 0 and 2 loader workers.
PEERS = {"dataloader": None, "accelerated": None, "lightning_trainer": "lightning"}
OURS, FLOOR, CAPTURED = "dist_train", "resident", "captured"

Rounds = list[dict[str, Found]]  # one entry per round: contestant -> its results


@dataclass(frozen=True)
class Contest:
    """One task and its contestants' results."""

    task: Task
    rounds: Rounds


_IN_FP32 = " fp32"  # suffix of a contestant that trains in fp32 while the others train in bf16


def contestants(mode: str, precision: str) -> list[str]:
    """Return the contestants: ours, eager and in its faster mode; the floor, on a GPU captured too; installed peers."""
    floors = [FLOOR, CAPTURED] if mode == "graph" else [FLOOR]
    if precision == "bf16":
        floors += [FLOOR + _IN_FP32, "dataloader" + _IN_FP32]
    return [OURS, f"{OURS} {mode}", *floors, *(name for name, needs in PEERS.items() if not needs or find_spec(needs))]


def measurements(task: Task, mode: str) -> dict[str, Callable[[], Found]]:
    """Return a function for each contestant that trains it once, with another seed each time."""
    return {name: partial(_run, task, name, count()) for name in contestants(mode, task.precision)}


def _run(task: Task, name: str, seeds: Iterator[int]) -> Found:
    task = replace(task, seed=next(seeds))
    if name.startswith(OURS):
        return measure(task, mode=name.removeprefix(OURS).strip() or "eager")
    peer = name.removesuffix(_IN_FP32)
    if peer != name:
        task = replace(task, precision="no")
    tasks = [replace(task, num_workers=workers) for workers in ((0, 2) if peer in PEERS else (0,))]
    results: list[Found] = [
        json.loads(output_of(f"dist_train.tools.bench.peers.{peer}", each.to_argument()).splitlines()[-1])
        for each in tasks
    ]
    return max(results, key=lambda each: each["samples_per_s"])


def ratios(rounds: Rounds, name: str, other: str, key: str = "samples_per_s") -> Interval:
    """Return the ratio of the samples per second of `name` to those of `other`, paired by round."""
    return Interval.of([each[name][key] / each[other][key] for each in rounds])


def best_peer(rounds: Rounds) -> str:
    """Return the peer with the highest median, or an empty string."""
    peers = [name for name in PEERS if name in rounds[0]]
    return max(peers, key=lambda name: _median(rounds, name, "samples_per_s"), default="")


def _median(rounds: Rounds, name: str, key: str) -> float:
    return statistics.median(each[name][key] for each in rounds)


def table(contests: list[Contest]) -> list[str]:
    """Return the results as Markdown."""
    task, rounds = contests[0].task, contests[0].rounds
    ours = [name for name in rounds[0] if name.startswith(OURS)]
    lines = [
        f"MNIST, batch {task.batch_size}, Adam, one process, n={len(rounds)} rounds, peers with the better of 0 and "
        f"2 loader workers; median samples/s, and the median of the paired ratios with its 95 % interval.",
        "",
        f"| net | precision | steps | contestant | samples/s | {' | '.join(f'{name} vs this' for name in ours)} "
        "| evaluation, samples/s | test accuracy | peak GiB |",
        f"|{'---|' * (8 + len(ours))}",
    ]
    for contest in contests:
        task, rounds = contest.task, contest.rounds
        best = best_peer(rounds)
        for name in rounds[0]:
            speed_ups = ["" if name.startswith(OURS) else ratios(rounds, our, name).text("x") for our in ours]
            lines.append(
                f"| {task.net} | {task.precision_name} | {task.steps} | {name}{' (best peer)' if name == best else ''} "
                f"| {_median(rounds, name, 'samples_per_s'):,.0f} | {' | '.join(speed_ups)} "
                f"| {_median(rounds, name, 'eval_samples_per_s'):,.0f} "
                f"| {100 * _median(rounds, name, 'accuracy'):.2f} % | {_median(rounds, name, 'peak_memory_gib'):.2f} |"
            )
    evaluations = [
        f"{each.task.net} {each.task.precision_name} {ratios(each.rounds, OURS, FLOOR, 'eval_samples_per_s').text('x')}"
        for each in contests
    ]
    return [*lines, "", f"Evaluation vs the bare fp32 loop at batch 256: {', '.join(evaluations)}."]


def draw(contests: list[Contest], figure: Any) -> None:
    """Plot each contestant's samples per second, with the range of all rounds."""
    figure.set_size_inches(4 * len(contests), 3.2)
    for axis, contest in zip(figure.subplots(1, len(contests), squeeze=False)[0], contests, strict=True):
        task, rounds = contest.task, contest.rounds
        for position, name in enumerate(rounds[0]):
            speeds = [each[name]["samples_per_s"] for each in rounds]
            median = statistics.median(speeds)
            errors = [[median - min(speeds)], [max(speeds) - median]]
            axis.barh(position, median, xerr=errors, color="C0" if name.startswith(OURS) else "C7", capsize=3)
        axis.set_yticks(range(len(rounds[0])), list(rounds[0]))
        axis.invert_yaxis()
        axis.set_title(f"{task.net}, {task.precision_name}, batch {task.batch_size}, n={len(rounds)}")
        axis.set_xlabel("samples/s")
