"""The probes as parts of the benchmark: each in its own process, shown as a table and a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from dist_train.launch.subprocesses import output_of
from dist_train.tools.bench.interval import Interval
from dist_train.tools.bench.rounds import Round

Probed = dict[str, list[dict[str, float]]]  # argument name -> the result of each repetition


def measurements(probe: str, arguments: Mapping[str, object]) -> dict[str, Callable[[], dict[str, float]]]:
    """Return a function that runs `probes.PROBE(argument)` for each argument, by the argument's name."""
    return {name: partial(_probe, probe, str(argument)) for name, argument in arguments.items()}


def _probe(probe: str, argument: str) -> dict[str, float]:
    result: dict[str, float] = json.loads(output_of("dist_train.tools.bench.probes", probe, argument).splitlines()[-1])
    return result


def by_name(rounds: Sequence[Round]) -> Probed:
    """Group the rounds' results by argument name."""
    return {name: [each[name] for each in rounds] for name in rounds[0]}


def _median(found: list[dict[str, float]], key: str) -> float:
    return statistics.median(each[key] for each in found)


def breakdown_table(found: Probed) -> list[str]:
    """Return the results as Markdown."""
    parts = list(next(iter(found.values()))[0])
    n = len(next(iter(found.values())))
    return [
        f"Milliseconds, batch 64, fp32, eager, synchronised after each part; median of n={n} processes of 200 steps.",
        "",
        f"| net | {' | '.join(parts)} |",
        f"|---|{'---|' * len(parts)}",
        *(f"| {net} | {' | '.join(f'{_median(those, part):.3f}' for part in parts)} |" for net, those in found.items()),
    ]


def breakdown_draw(found: Probed, figure: Any) -> None:
    """Plot the parts of a step, stacked as shares of their sum."""
    figure.set_size_inches(8, 1 + 0.5 * len(found))
    axis = figure.subplots()
    parts = [part for part in next(iter(found.values()))[0] if part != "whole step"]
    for position, those in enumerate(found.values()):
        times, left = [_median(those, part) for part in parts], 0.0
        for number, (part, time) in enumerate(zip(parts, times, strict=True)):
            share = 100 * time / sum(times)
            axis.barh(position, share, left=left, color=f"C{number}", label=part if not position else None)
            left += share
    axis.set_yticks(range(len(found)), list(found))
    axis.invert_yaxis()
    axis.set_xlabel("% of an eager step, batch 64")
    axis.legend(bbox_to_anchor=(1, 1), loc="upper left")


def checkpoint_table(found: Probed) -> list[str]:
    """Return the results as Markdown."""
    lines = [
        f"n={len(next(iter(found.values())))} processes of 100 saves each (mlp, Adam) while training goes on; medians.",
        "",
        "| parameters | stall of the loop, ms | p99, ms | worst, ms | CPU, ms | p99, ms | written to disk after, ms "
        "| above twice the median, by longest part |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for those in found.values():
        stall = Interval.of([each["stall_ms"] for each in those]).text(digits=1)
        worst = max(each["worst_stall_ms"] for each in those)
        p99, cpu, cpu_p99 = (_median(those, key) for key in ("p99_stall_ms", "cpu_ms", "p99_cpu_ms"))
        parameters, write = those[0]["parameters"], _median(those, "write_ms")
        counts = {part: sum(each[part] for each in those) for part in those[0] if part.startswith("long ")}
        long = ", ".join(f"{part.removeprefix('long ')} {count:.0f}" for part, count in counts.items() if count)
        lines.append(
            f"| {parameters:,.0f} | {stall} | {p99:.1f} | {worst:.1f} | {cpu:.1f} | {cpu_p99:.1f} | {write:.0f} "
            f"| {long or 'none'} |"
        )
    return lines


def checkpoint_draw(found: Probed, figure: Any) -> None:
    """Plot stall and write time against the size of the net."""
    figure.set_size_inches(4, 3.2)
    axis = figure.subplots()
    sizes = [those[0]["parameters"] for those in found.values()]
    for key, label in (("stall_ms", "stall of the loop"), ("write_ms", "written to disk after")):
        _points(axis, sizes, [[each[key] for each in those] for those in found.values()], label)
    axis.set_xlabel("parameters")
    axis.set_ylabel("ms")
    axis.set_yscale("log")
    axis.legend()


def guards_table(found: Probed) -> list[str]:
    """Return the results as Markdown."""
    return [
        f"Batch 64, fp32, eager; n={len(next(iter(found.values())))} processes, each the median of 148 paired blocks.",
        "",
        "| net | a step alone, ms | with all guards, ms | overhead, % |",
        "|---|---|---|---|",
        *(
            f"| {net} | {_median(those, 'bare_ms'):.3f} | {_median(those, 'guarded_ms'):.3f} "
            f"| {Interval.of([each['overhead_percent'] for each in those]).text(digits=1)} |"
            for net, those in found.items()
        ),
    ]


def guards_draw(found: Probed, figure: Any) -> None:
    """Plot the overhead of each net."""
    figure.set_size_inches(4, 3.2)
    axis = figure.subplots()
    _points(axis, list(range(len(found))), [[each["overhead_percent"] for each in those] for those in found.values()],
            "all guards")  # fmt: skip
    axis.set_xticks(range(len(found)), list(found))
    axis.set_ylim(bottom=0)
    axis.set_ylabel("% of an eager step, batch 64")


def growth_table(found: Probed) -> list[str]:
    """Return the results as Markdown."""
    n = len(next(iter(found.values())))
    results = [each for those in found.values() for each in those]
    return [
        f"mlp, batch 64, fp32, eager, the whole set resident; medians of n={n} processes.",
        "",
        "| examples | step, ms | start of an epoch, ms | peak GiB |",
        "|---|---|---|---|",
        *(
            f"| {those[0]['examples']:,.0f} | {Interval.of([each['step_ms'] for each in those]).text(digits=3)} "
            f"| {_median(those, 'epoch_start_ms'):.1f} | {_median(those, 'peak_memory_gib'):.2f} |"
            for those in found.values()
        ),
        "",
        f"An epoch of 10 million indices starts in {_median(results, 'epoch_start_of_ten_million_ms'):.0f} ms.",
    ]


def growth_draw(found: Probed, figure: Any) -> None:
    """Plot step time and memory against the number of examples."""
    figure.set_size_inches(8, 3.2)
    sizes = [those[0]["examples"] for those in found.values()]
    for axis, key, label in zip(
        figure.subplots(1, 2), ("step_ms", "peak_memory_gib"), ("step, ms", "peak GiB"), strict=True
    ):
        _points(axis, sizes, [[each[key] for each in those] for those in found.values()], label)
        axis.set_xscale("log")
        axis.set_ylim(bottom=0)
        axis.set_xlabel("examples")
        axis.set_ylabel(label)


def _points(axis: Any, positions: list[float], values: list[list[float]], label: str) -> None:
    intervals = [Interval.of(those) for those in values]
    errors = [[each.median - each.low for each in intervals], [each.high - each.median for each in intervals]]
    axis.errorbar(positions, [each.median for each in intervals], yerr=errors, marker="o", capsize=3, label=label)
