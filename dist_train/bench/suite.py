"""The parts of the benchmark by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_train.bench import contest, inside, scaling, speedrun, startup
from dist_train.bench.report import check_pictures, write
from dist_train.bench.task import Task


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user asks for."""

    nets: tuple[str, ...]
    precisions: tuple[str, ...]
    batch_size: int | None
    steps: int
    nprocs: tuple[int, ...]
    repetitions: int

    def tasks(self, batch_size: int) -> list[Task]:
        size = self.batch_size or batch_size
        nets, precisions = self.nets, self.precisions
        return [Task(net=net, batch_size=size, steps=self.steps, precision=p) for p in precisions for net in nets]


@dataclass(frozen=True)
class Part:
    """How something is measured, and shown as Markdown lines and in a matplotlib figure."""

    measure: Callable[[Options], Any]
    table: Callable[[Any], list[str]]
    draw: Callable[[Any, Any], None]


def _speed(options: Options) -> list[contest.Contest]:
    tasks = options.tasks(batch_size=64)
    mode = "compile" if tasks[0].on_cpu else "graph"
    return [
        contest.Contest(task, contest.run_rounds(task, contest.contestants(mode, task.precision), options.repetitions))
        for task in tasks
    ]


def _scaling(options: Options) -> list[contest.Contest]:
    tasks = options.tasks(batch_size=512)
    return [contest.Contest(task, scaling.run_rounds(task, options.nprocs, options.repetitions)) for task in tasks]


PARTS = {
    "speed": Part(_speed, contest.table, contest.draw),
    "scaling": Part(_scaling, scaling.table, scaling.draw),
    "breakdown": Part(
        lambda options: inside.probe("breakdown", options.nets, options.repetitions),
        inside.breakdown_table,
        inside.breakdown_draw,
    ),
    "startup": Part(lambda options: startup.run_rounds(options.repetitions), startup.table, startup.draw),
    "checkpoint": Part(  # mlps of 40 thousand, 1 million and 10 million parameters
        lambda options: inside.probe("stall", (50, 1258, 12579), options.repetitions),
        inside.checkpoint_table,
        inside.checkpoint_draw,
    ),
    "speedrun": Part(
        lambda options: speedrun.run_seeds(4 * options.repetitions, "eager" if Task().on_cpu else "graph"),
        speedrun.table,
        speedrun.draw,
    ),
    "guards": Part(
        lambda options: inside.probe("guards", options.nets, options.repetitions),
        inside.guards_table,
        inside.guards_draw,
    ),
    "growth": Part(  # MNIST so many times over
        lambda options: inside.probe("growth", (1, 10, 100), options.repetitions),
        inside.growth_table,
        inside.growth_draw,
    ),
}


def run_part(name: str, options: Options, out: Path) -> list[str]:
    """Measure one part and write it to `out`; the lines of its table.

    Raises:
        ConfigError: matplotlib is not installed.
        LaunchError: a contestant failed.
    """
    check_pictures()
    part = PARTS[name]
    found = part.measure(options)
    table = part.table(found)
    write(name, table, found, lambda figure: part.draw(found, figure), out)
    return table
