"""Scaling: the same global batch on more processes; this harness and the bare DDP loop take turns."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from dist_train.distributed.process_info import available_cores
from dist_train.launch.subprocesses import output_of_ranks
from dist_train.tools.bench.contest import Contest, ratios
from dist_train.tools.bench.interval import Interval
from dist_train.tools.bench.ours import measure
from dist_train.tools.bench.task import Found, Task

OURS, BARE = "dist_train", "bare_ddp"


def measurements(task: Task, nprocs: Sequence[int]) -> dict[str, Callable[[], Found]]:
    """Return a function for each contestant, such as "dist_train 2". Processes have one thread at every world size."""
    functions: dict[str, Callable[[], Found]] = {}
    for nproc in nprocs:
        functions[f"{OURS} {nproc}"] = partial(measure, task, nproc=nproc, threads=1)
        functions[f"{BARE} {nproc}"] = partial(_bare, task, nproc)
    return functions


def _bare(task: Task, nproc: int) -> Found:
    program = "dist_train.tools.bench.peers.bare_ddp"
    out = output_of_ranks(nproc, program, task.to_argument(), environment={"OMP_NUM_THREADS": "1"})
    found: Found = json.loads(out.splitlines()[-1])
    return found


def table(scaling: list[Contest]) -> list[str]:
    """Return the results as Markdown."""
    task, rounds = scaling[0].task, scaling[0].rounds
    lines = [
        f"One thread per process, global batch {task.batch_size}, n={len(rounds)} rounds of {task.steps} steps; "
        f"medians and paired ratios with their 95 % interval. Efficiency: the speed-up over one process, per process.",
        "",
        "| net | precision | processes | samples/s | speed-up | efficiency | data wait, ms per step | vs bare DDP "
        "| bare DDP's speed-up |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for contest in scaling:
        task, rounds = contest.task, contest.rounds
        nprocs = sorted({int(name.split()[1]) for name in rounds[0]})
        for nproc in nprocs:
            ours, bare = f"{OURS} {nproc}", f"{BARE} {nproc}"
            up = ratios(rounds, ours, f"{OURS} {nprocs[0]}")
            note = " (OVERSUBSCRIBED)" if nproc > available_cores() else ""
            wait = statistics.median(each[ours]["data_wait_ms"] for each in rounds)
            lines.append(
                f"| {task.net} | {task.precision_name} | {nproc}{note} "
                f"| {statistics.median(each[ours]['samples_per_s'] for each in rounds):,.0f} | {up.text('x')} "
                f"| {100 * up.median * nprocs[0] / nproc:.0f} % | {wait:.3f} | {ratios(rounds, ours, bare).text('x')} "
                f"| {ratios(rounds, bare, f'{BARE} {nprocs[0]}').text('x')} |"
            )
    return lines


def draw(scaling: list[Contest], figure: Any) -> None:
    """Plot speed, and memory of rank zero, against the number of processes, with the range of all rounds."""
    figure.set_size_inches(4 * len(scaling), 5.4)
    rows = (("samples_per_s", "samples/s"), ("peak_memory_gib", "peak GiB of rank 0"))
    for (key, label), axes in zip(rows, figure.subplots(2, len(scaling), squeeze=False), strict=True):
        for axis, contest in zip(axes, scaling, strict=True):
            task, rounds = contest.task, contest.rounds
            nprocs = sorted({int(name.split()[1]) for name in rounds[0]})
            for kind, color in ((OURS, "C0"), (BARE, "C7")):
                intervals = [Interval.of([each[f"{kind} {n}"][key] for each in rounds]) for n in nprocs]
                errors = [[i.median - i.low for i in intervals], [i.high - i.median for i in intervals]]
                axis.errorbar(
                    nprocs, [i.median for i in intervals], yerr=errors, color=color, capsize=3, marker="o", label=kind
                )
            beyond = [nproc for nproc in nprocs if nproc > available_cores()]
            if beyond:
                axis.axvspan(beyond[0] - 0.5, beyond[-1] + 0.5, color="0.93", label="oversubscribed")
            axis.set_xticks(nprocs)
            axis.set_ylim(bottom=0)
            axis.set_xlabel("processes with one thread each")
            axis.set_ylabel(label)
            axis.set_title(f"{task.net}, {task.precision_name}, global batch {task.batch_size}, n={len(rounds)}")
        axes[0].legend()
