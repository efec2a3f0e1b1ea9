"""Start-up: from the command to the first optimizer step, compared with the imports that every training needs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from dist_train.launch.subprocesses import output_of
from dist_train.tools.bench.interval import Interval
from dist_train.tools.bench.ours import train

Seconds = list[dict[str, float]]  # one entry per round

HELP, IMPORTS, FIRST_STEP = "dist-train --help", "import torch, accelerate", "command to first step"


def measurements() -> dict[str, Callable[[], float]]:
    """Return the measurements: one process, eager, W&B disabled. Discard the first round: it may unpack the data."""
    return {
        HELP: lambda: _seconds(lambda: output_of("dist_train", "--help")),
        IMPORTS: lambda: _seconds(lambda: output_of("dist_train.tools.bench.peers.imports")),
        FIRST_STEP: _first_step,
    }


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _first_step() -> float:
    """Return the seconds until the first step's line in metrics.jsonl."""
    settings = {"model.name": "mlp", "train_for": "1 steps", "log_every": 1, "eval_every": 0, "step_mode": "eager"}
    lines, result = train(settings)
    return float(lines[0]["time"] - result["started"])


def table(rounds: Seconds) -> list[str]:
    """Return the results as Markdown."""
    over = Interval.of([each[FIRST_STEP] - each[IMPORTS] for each in rounds])
    return [
        f"One process, eager, n={len(rounds)} rounds; medians with their 95 % interval.",
        "",
        "| | seconds |",
        "|---|---|",
        *(f"| {name} | {Interval.of([each[name] for each in rounds]).text()} |" for name in rounds[0]),
        f"| first step minus imports | {over.text()} |",
    ]


def draw(rounds: Seconds, figure: Any) -> None:
    """Plot bars with the range of all rounds."""
    figure.set_size_inches(6, 2)
    axis = figure.subplots()
    for position, name in enumerate(rounds[0]):
        interval = Interval.of([each[name] for each in rounds])
        errors = [[interval.median - interval.low], [interval.high - interval.median]]
        axis.barh(position, interval.median, xerr=errors, color="C0" if name != IMPORTS else "C7", capsize=3)
    axis.set_yticks(range(len(rounds[0])), list(rounds[0]))
    axis.invert_yaxis()
    axis.set_xlabel(f"seconds, n={len(rounds)}")
