"""The parts of the benchmark, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dist_train.tools.bench import contest, gpu, inside, jpegs, scaling, speedrun, startup, web
from dist_train.tools.bench.report import check_pictures, write
from dist_train.tools.bench.rounds import Round, Series, TimeEstimate
from dist_train.tools.bench.task import Task


@dataclass(frozen=True, kw_only=True)
class Options:
    """The user's options."""

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
    """What is measured, how its rounds are combined, and how that is shown: as Markdown and a matplotlib figure."""

    series: Callable[[Options], list[Series]]
    collect: Callable[[Options, list[list[Round]]], Any]  # the rounds of each series
    table: Callable[[Any], list[str]]
    draw: Callable[[Any, Any], None]


# For the first time estimate, on two CPU cores: seconds to start a process, and to train on one example.
_START_S = 8.0
_EXAMPLE_S = {"mlp": 1e-4, "bks": 2e-4, "conv": 1e-3}


def _typical_s(net: str, examples: int) -> float:
    return _START_S + examples * _EXAMPLE_S.get(net, 2e-4)


def _contest(
    name: str,
    batch_size: int,
    measurements: Callable[[Task, Options], Mapping[str, Callable[[], Any]]],
    table: Callable[[Any], list[str]],
    draw: Callable[[Any, Any], None],
) -> Part:
    """A part in which contestants train the same task, for each net and precision."""

    def series(options: Options) -> list[Series]:
        return [
            Series(
                f"{name}, {task.net} {task.precision_name}", measurements(task, options), options.repetitions,
                _typical_s(task.net, 2 * task.steps * task.batch_size),
            )
            for task in options.tasks(batch_size)
        ]  # fmt: skip

    def collect(options: Options, found: list[list[Round]]) -> list[contest.Contest]:
        tasks = options.tasks(batch_size)
        return [contest.Contest(task, rounds) for task, rounds in zip(tasks, found, strict=True)]

    return Part(series, collect, table, draw)


def _probe(
    name: str,
    probe: str,
    arguments: Callable[[Options], Mapping[str, object]],
    table: Callable[[Any], list[str]],
    draw: Callable[[Any, Any], None],
    typical_s: float = 2 * _START_S,
) -> Part:
    """A part that runs a probe inside a process of this harness, once for each of its named arguments."""

    def series(options: Options) -> list[Series]:
        return [Series(name, inside.measurements(probe, arguments(options)), options.repetitions, typical_s)]

    return Part(series, lambda _, found: inside.by_name(found[0]), table, draw)


def _nets(options: Options) -> dict[str, str]:
    return {net: net for net in options.nets}


def _resident_and_streamed(options: Options) -> dict[str, str]:
    return {name: name.replace(" ", "") for net in options.nets for name in (net, f"{net}, streamed")}


def _faster_mode() -> str:
    return "compile" if Task().on_cpu else "graph"


PARTS = {
    "speed": _contest(
        "speed", 64, lambda task, _: contest.measurements(task, _faster_mode()), contest.table, contest.draw
    ),
    "scaling": _contest(
        "scaling", 512, lambda task, options: scaling.measurements(task, options.nprocs), scaling.table, scaling.draw
    ),
    "breakdown": _probe("breakdown", "breakdown", _nets, inside.breakdown_table, inside.breakdown_draw),
    "startup": Part(
        lambda options: [Series("startup", startup.measurements(), options.repetitions + 1, _START_S / 2)],
        lambda _, found: found[0][1:],
        startup.table,
        startup.draw,
    ),
    "checkpoint": _probe(
        "checkpoint",
        "stall",
        lambda _: {"mlp of 40 thousand": 50, "of 1 million": 1258, "of 10 million parameters": 12579},
        inside.checkpoint_table,
        inside.checkpoint_draw,
        typical_s=60.0,
    ),
    "speedrun": Part(
        lambda options: [Series("speedrun", speedrun.measurements(4 * options.repetitions), 1, _START_S)],
        lambda _, found: list(found[0][0].values()),
        speedrun.table,
        speedrun.draw,
    ),
    "guards": _probe(
        "guards", "guards", _resident_and_streamed, inside.guards_table, inside.guards_draw, typical_s=300.0
    ),
    "growth": _probe(
        "growth",
        "growth",
        lambda _: {f"MNIST {times} times over": times for times in (1, 10, 100)},
        inside.growth_table,
        inside.growth_draw,
    ),
    "jpegs": Part(
        lambda options: [Series("jpegs", {"all loops": jpegs.measure}, options.repetitions, 30.0)],
        lambda _, found: [each["all loops"] for each in found[0]],
        jpegs.table,
        jpegs.draw,
    ),
    "gpu": Part(
        lambda options: [Series("gpu", gpu.measurements(), 1, 20.0)], lambda _, found: found[0], gpu.table, gpu.draw
    ),
    "web": Part(
        lambda options: [Series("web", web.measurements(), options.repetitions, 60.0)],
        lambda _, found: inside.by_name(found[0]),
        web.table,
        web.draw,
    ),
}


def run(names: Sequence[str], options: Options, out: Path, say: Callable[[str], object]) -> Iterator[list[str]]:
    """Measure parts, write each to `out` and yield its table's lines. `say` gets a line before each measurement.

    Raises:
        ConfigError: matplotlib is not installed.
        LaunchError: a contestant failed.
    """
    check_pictures()
    series = {name: PARTS[name].series(options) for name in names}
    estimate = TimeEstimate([each for those in series.values() for each in those], say)
    for name, those in series.items():
        part = PARTS[name]
        found = part.collect(options, [estimate.run(each) for each in those])
        table = part.table(found)
        write(name, table, found, partial(part.draw, found), out)
        yield table
