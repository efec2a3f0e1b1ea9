"""Time to 99 % on MNIST: accuracy and training seconds over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from dist_train.tools.bench.interval import Interval
from dist_train.tools.bench.ours import train
from dist_train.tools.bench.task import Task

Runs = list[dict[str, Any]]  # result.json of each seed


def measurements(count: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return functions that run `-c mnist_speedrun` with seeds 0, 1, 2, ..."""
    mode = "eager" if Task().on_cpu else "graph"
    return {f"seed {seed}": partial(_run, seed, mode) for seed in range(count)}


def _run(seed: int, mode: str) -> dict[str, Any]:
    return train({"seed": seed, "step_mode": mode}, config="mnist_speedrun")[1]


def table(runs: Runs) -> list[str]:
    """Return the results as Markdown."""
    accuracies = [100 * run["test/accuracy"] for run in runs]
    seconds = {name: Interval.of([run[name] for run in runs]).text() for name in ("train_s", "warm_up_s", "total_s")}
    return [
        f"`mnist_speedrun`, one process, n={len(runs)} seeds, step mode {runs[0]['step_mode']}. Test accuracy: mean, "
        "standard deviation, lowest; seconds: median with its 95 % interval.",
        "",
        "| test accuracy | lowest | training, s | warm-up with compiling or capture, s | total, s |",
        "|---|---|---|---|---|",
        f"| {statistics.mean(accuracies):.2f} +- {statistics.stdev(accuracies):.2f} % | {min(accuracies):.2f} % "
        f"| {seconds['train_s']} | {seconds['warm_up_s']} | {seconds['total_s']} |",
    ]


def draw(runs: Runs, figure: Any) -> None:
    """Plot each seed's accuracy against its training seconds."""
    figure.set_size_inches(4, 3.2)
    axis = figure.subplots()
    axis.plot([run["train_s"] for run in runs], [100 * run["test/accuracy"] for run in runs], "o")
    axis.axhline(99, color="C7", linewidth=1)
    axis.set_xlim(left=0)
    axis.set_xlabel("training, s")
    axis.set_ylabel(f"test accuracy, % (n={len(runs)})")
