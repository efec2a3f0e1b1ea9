"""The page of runs: how soon it answers, what it takes of the machine, and whether a training feels it."""

from __future__ import annotations

import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy

from dist_train.launch.subprocesses import output_of_program, running
from dist_train.runs.directory import RunDir
from dist_train.tools.bench.inside import Probed
from dist_train.tools.bench.interval import Interval
from dist_train.tools.bench.page import percent_of_core, poll, server, write_runs

Found = dict[str, float]

START, RUNS, MANY_RUNS, TRAINING = "start", "1 000 runs", "10 000 runs", "a training among 1 000 runs"
_STEPS = 10**9  # of a training that is stopped after it was watched


def measurements() -> dict[str, Callable[[], Found]]:
    """Return the measurements. Each starts a server of its own over runs of its own."""
    return {
        START: start,
        RUNS: partial(list_runs, 1000),
        MANY_RUNS: partial(list_runs, 10_000),
        TRAINING: partial(watch_training, 1000),
    }


def start() -> Found:
    """Return the seconds from the command to the first answer, and those of an empty Python process."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        with server(Path(folder)) as (_, open_tab):
            open_tab().get("/")
            seconds = time.perf_counter() - began
    began = time.perf_counter()
    output_of_program(sys.executable, "-c", "pass", timeout_s=60.0)
    return {"start_s": seconds, "python_s": time.perf_counter() - began}


def list_runs(count: int, changes: int = 10, idle_s: float = 20.0) -> Found:
    """Return the seconds of the first list, of a list after one status has changed (median), and of a bare scan of the
    folders; then what the server takes while two tabs poll and nothing changes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_runs(folder, count)
        with server(folder) as (process, open_tab):
            tabs = [open_tab(), open_tab()]
            tabs[0].get("/login")
            bare_s = [_bare_scan(folder) for _ in range(changes)]
            cold_s, warm_s = tabs[0].get("/"), []
            for number in range(changes):
                time.sleep(1.0)  # it looks at the folder less than once a second
                RunDir(folder / "run-00002").status.update(state="FINISHED", step=number)
                warm_s.append(tabs[0].poll())
            idle_percent = percent_of_core(process, tabs, idle_s)
            return {
                "cold_s": cold_s, "warm_s": statistics.median(warm_s), "bare_s": statistics.median(bare_s),
                "idle_percent": idle_percent, "rss_mib": process.memory_info().rss / 2**20,
                "with_torch": any("libtorch" in each.path for each in process.memory_maps()),
            }  # fmt: skip


def watch_training(count: int, pairs: int = 25, block_s: float = 2.0, watched_s: float = 20.0) -> Found:
    """Watch a training with two tabs. Return the seconds from a write of its status until a tab shows it (median and
    worst), what the server takes meanwhile, and the samples per second as a ratio to those without tabs: the median
    over pairs of blocks that alternate."""
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name), Path(name) / ".log"
        write_runs(folder, count)
        run_dir = RunDir(folder / "watched")
        settings = {
            "train_for": f"{_STEPS} steps", "log_every": 25, "eval_every": 0, "save_every": 0,
            "step_mode": "eager", "tracking.wandb": "disabled", "tracking.pictures": False, "runs_dir": folder,
        }  # fmt: skip
        overrides = [f"{key}={value}" for key, value in settings.items()]
        train = ["train", "-q", "-c", "mnist_mlp", "--run-name", "watched", *overrides]
        written: dict[int, float] = {}  # step -> time.time()
        delays: dict[int, float] = {}

        def note_delays() -> None:
            shown, now = int(re.findall(rf"(\d+)/{_STEPS}", tabs[0].content)[0]), time.time()
            status = run_dir.status.read()
            written[status["step"]] = status["heartbeat"]
            for step in written:
                if step <= shown:
                    delays.setdefault(step, now - written[step])

        blocks: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        begun, one_thread = run_dir.metrics.path.exists, {"OMP_NUM_THREADS": "1"}
        with server(folder) as (process, open_tab), running(*train, log=log, has_begun=begun, environment=one_thread):
            tabs = [open_tab(), open_tab()]
            percent = percent_of_core(process, tabs, watched_s, note_delays)
            for number in range(pairs):
                for watched in (False, True) if number % 2 else (True, False):
                    began = time.time()
                    # New tabs: the server closes a connection that was quiet for some seconds.
                    poll([open_tab(), open_tab()] if watched else [], block_s)
                    blocks[watched].append((began, time.time()))
        lines = list(run_dir.metrics.read())
        pairs_of_blocks = zip(blocks[True], blocks[False], strict=True)
        ratios = [_speed(lines, *watched) / _speed(lines, *alone) for watched, alone in pairs_of_blocks]
        return {
            "delay_s": statistics.median(delays.values()), "worst_delay_s": max(delays.values()),
            "percent": percent, "ratio": statistics.median(ratios),
        }  # fmt: skip


def _bare_scan(folder: Path) -> float:
    """Return the seconds of the least that any list of runs needs."""
    began = time.perf_counter()
    with os.scandir(folder) as entries:
        for entry in entries:
            os.stat(f"{entry.path}/status.json")  # noqa: PTH116
    return time.perf_counter() - began


def _speed(lines: Sequence[Mapping[str, Any]], began: float, ended: float) -> float:
    """Return the samples per second between two moments."""
    times, samples = ([line[key] for line in lines] for key in ("time", "samples"))
    before, after = numpy.interp([began, ended], times, samples)
    return float(after - before) / (ended - began)


_ROWS = (  # what, measurement, key, key of the least that it could take, target
    ("start to first answer, s", START, "start_s", "python_s", "< 1"),
    ("first list of 1 000 runs, s", RUNS, "cold_s", "bare_s", "< 1"),
    ("list of 1 000 runs after one status changed, s", RUNS, "warm_s", "bare_s", "< 0.1"),
    ("first list of 10 000 runs, s", MANY_RUNS, "cold_s", "bare_s", ""),
    ("list of 10 000 runs after one status changed, s", MANY_RUNS, "warm_s", "bare_s", "< 1"),
    ("memory with 1 000 runs, MiB", RUNS, "rss_mib", None, "< 80"),
    ("memory with 10 000 runs, MiB", MANY_RUNS, "rss_mib", None, ""),
    ("two tabs on 1 000 runs that do not change, % of a core", RUNS, "idle_percent", None, "< 3"),
    ("two tabs on 1 000 runs and a training, % of a core", TRAINING, "percent", None, ""),
    ("from a write of its status until a tab shows it, s", TRAINING, "delay_s", None, ""),
    ("the worst of these, s", TRAINING, "worst_delay_s", None, "<= 2"),
    ("samples/s of the training, with two tabs / without", TRAINING, "ratio", None, ">= 0.98"),
)


def table(found: Probed) -> list[str]:
    """Return the results as Markdown."""
    lines = [
        f"n={len(found[RUNS])} rounds; medians with their 95 % interval. The least: `python -c pass` for the start, a "
        f"scan of the folders with one stat each for a list. torch is "
        f"{'' if any(each['with_torch'] for each in found[RUNS]) else 'not '}loaded.",
        "",
        "| | measured | as a multiple of the least | target |",
        "|---|---|---|---|",
    ]
    for what, name, key, least, target in _ROWS:
        measured = Interval.of([each[key] for each in found[name]]).text(digits=3)
        multiple = Interval.of([each[key] / each[least] for each in found[name]]).text("x", 1) if least else ""
        lines.append(f"| {what} | {measured} | {multiple} | {target} |")
    return lines


def draw(found: Probed, figure: Any) -> None:
    """Plot the seconds of the start and of the lists, with the range of all rounds."""
    figure.set_size_inches(7, 2.4)
    axis = figure.subplots()
    rows = [row for row in _ROWS if row[3]]
    for position, (_, name, key, *_) in enumerate(rows):
        interval = Interval.of([each[key] for each in found[name]])
        errors = [[interval.median - interval.low], [interval.high - interval.median]]
        axis.barh(position, interval.median, xerr=errors, color="C0", capsize=3)
    axis.set_yticks(range(len(rows)), [what.removesuffix(", s") for what, *_ in rows])
    axis.invert_yaxis()
    axis.set_xlabel(f"seconds, n={len(found[RUNS])}")
