"""The benchmark's statistics and reports. The contestants run in `make bench`, and a few steps of one part here."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import comb
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dist_train.cli import main
from dist_train.tools.bench import jpegs, rounds, scaling, startup, web
from dist_train.tools.bench.contest import Contest, Rounds, best_peer, ratios, table
from dist_train.tools.bench.interval import Interval
from dist_train.tools.bench.report import write
from dist_train.tools.bench.rounds import Series, TimeEstimate
from dist_train.tools.bench.suite import PARTS, Options
from dist_train.tools.bench.task import Task
from support.clock import Clock
from support.processes import DIST_TRAIN, run


@pytest.mark.parametrize("n", [1, 3, 5, 6, 9, 20, 30])
def test_interval_covers_median_with_95_percent(n: int) -> None:
    """It misses if too many values fall on one side. The next narrower interval does not reach 95 %."""
    found = Interval.of([float(value) for value in range(n)])
    left_out = int(found.low)
    assert found.high == n - 1 - left_out

    def misses(outside: int) -> float:
        return float(2 * sum(comb(n, k) for k in range(outside + 1)) / 2**n)

    assert misses(left_out) <= 0.05 or left_out == 0
    assert misses(left_out + 1) > 0.05


def rounds_of(**speeds: list[float]) -> Rounds:
    return [
        {
            name.replace("_2", " 2").replace("_1", " 1"): {
                "samples_per_s": own[k], "eval_samples_per_s": 2 * own[k], "accuracy": 0.9, "peak_memory_gib": 1.0,
                "data_wait_ms": 0.5,
            }
            for name, own in speeds.items()
        }
        for k in range(3)
    ]  # fmt: skip


SPEED = rounds_of(
    dist_train=[200.0, 100.0, 330.0], resident=[100.0, 50.0, 330.0], dataloader=[20.0, 5.0, 30.0],
    accelerated=[10.0, 25.0, 11.0],
)  # fmt: skip
SCALING = rounds_of(
    dist_train_1=[10.0, 11.0, 12.0], dist_train_2=[20.0, 20.9, 24.0], bare_ddp_1=[5.0, 5.5, 6.0],
    bare_ddp_2=[8.0, 9.0, 10.0],
)  # fmt: skip


def test_ratios_pair_values_of_one_round() -> None:
    assert ratios(SPEED, "dist_train", "dataloader") == Interval(11.0, 10.0, 20.0)
    assert best_peer(SPEED) == "dataloader"


def test_speed_table() -> None:
    lines = table([Contest(Task(net="mlp"), SPEED)])
    row = "| mlp | fp32 | 937 | dataloader (best peer) | 20 | 11.00x (10.00 to 20.00) | 40 | 90.00 % | 1.00 |"
    assert row in lines
    assert "mlp fp32 2.00x (1.00 to 2.00)" in lines[-1]
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_scaling_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "available_cores", lambda: 1)
    lines = scaling.table([Contest(Task(net="conv", batch_size=512), SCALING)])
    row = "| conv | fp32 | 2 (OVERSUBSCRIBED) | 21 | 2.00x (1.90 to 2.00) | 100 % | 0.500 | 2.40x (2.32 to 2.50) "
    assert any(line.startswith(row) for line in lines)
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


PROBED = {
    "breakdown": {"mlp": [{"forward": 1.0, "backward": 2.0, "whole step": 3.0}] * 2},
    "checkpoint": {
        "50": [
            {
                "parameters": 40.0,
                "stall_ms": 1.0,
                "p99_stall_ms": 1.5,
                "worst_stall_ms": 2.5,
                "cpu_ms": 1.0,
                "p99_cpu_ms": 1.5,
                "write_ms": 9.0,
                "long check": 0,
                "long copy": 1,
            }
        ]
        * 2
    },
    "guards": {
        "mlp": [{"bare_ms": 0.5, "guarded_ms": 0.505, "overhead_percent": 1.0}] * 2,
        "mlp, streamed": [{"bare_ms": 2.0, "guarded_ms": 2.01, "overhead_percent": 0.5}] * 2,
    },
    "growth": {
        "1": [
            {
                "examples": 6e4,
                "step_ms": 0.5,
                "epoch_start_ms": 1.0,
                "epoch_start_of_ten_million_ms": 2.0,
                "peak_memory_gib": 0.3,
            }
        ]
        * 2
    },
    "web": {
        web.START: [{"start_s": 0.3, "python_s": 0.01}] * 2,
        **{
            name: [
                {
                    "cold_s": 0.2,
                    "warm_s": 0.02,
                    "bare_s": 0.002,
                    "idle_percent": 1.5,
                    "rss_mib": 57.0,
                    "with_torch": False,
                }
            ]
            * 2
            for name in (web.RUNS, web.MANY_RUNS)
        },
        web.TRAINING: [{"delay_s": 0.6, "worst_delay_s": 1.5, "percent": 2.5, "ratio": 0.99}] * 2,
    },
}


JPEGS = [
    {
        jpegs.label(loop, workers): {"images_per_s": speed * pace, "cpu_ms": 1000 / speed}
        for workers in jpegs.WORKERS
        for loop, speed in {"pil": 150.0, "simplejpeg": 200.0, jpegs.TORCHVISION: 100.0}.items()
    }
    for pace in (0.5, 1.0, 2.0)
]


ON_GPU = [{"mlp, fp32": {
    "dist_train graph": {"ms": [1.0, 1.1, 1.0], "launches": 3.0, "waits": 0.0, "start": 0.5},
    "bare loop": {"ms": [2.0, 2.2, 3.0]},
    "captured by hand": {"ms": [0.5, 0.55, 0.5]},
}}]  # fmt: skip


@pytest.mark.parametrize(
    ("part", "found"),
    [
        ("gpu", ON_GPU),
        ("speed", [Contest(Task(net="mlp"), SPEED)]),
        ("scaling", [Contest(Task(net="conv", batch_size=512), SCALING)]),
        ("startup", [{startup.HELP: 0.1, startup.IMPORTS: 1.0, startup.FIRST_STEP: 1.5}] * 3),
        ("jpegs", JPEGS),
        *PROBED.items(),
    ],
)
def test_every_part_writes_table_json_and_picture(part: str, found: Any, tmp_path: Path) -> None:
    write(part, PARTS[part].table(found), found, lambda figure: PARTS[part].draw(found, figure), tmp_path)
    assert json.loads((tmp_path / f"{part}.json").read_text()).keys() == {"machine", "found"}
    assert f"![{part}]({part}.png)" in (tmp_path / f"{part}.md").read_text()
    assert (tmp_path / f"{part}.png").read_bytes().startswith(b"\x89PNG")


def test_guards_are_measured_over_resident_and_streamed_set() -> None:
    options = Options(nets=("mlp", "conv"), precisions=("no",), batch_size=None, steps=1, nprocs=(1,), repetitions=1)
    (series,) = PARTS["guards"].series(options)
    assert [*series.measurements] == ["mlp", "mlp, streamed", "conv", "conv, streamed"]
    assert "| mlp, streamed | 2.000 | 2.010 | 0.5 (0.5 to 0.5) |" in PARTS["guards"].table(PROBED["guards"])


def test_table_of_the_page() -> None:
    lines = PARTS["web"].table(PROBED["web"])
    assert lines[0].endswith("torch is not loaded.")
    row = "| first list of 1 000 runs, s | 0.200 (0.200 to 0.200) | 100.0x (100.0 to 100.0) | < 1 |"
    assert row in lines
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_table_of_jpegs() -> None:
    lines = jpegs.table(JPEGS)
    assert "| simplejpeg, 2 workers | 200 | 2.00x (2.00 to 2.00) | 5.00 | 2.00x (2.00 to 2.00) |" in lines
    assert len([line for line in lines if line.startswith("| ")]) == 1 + 6


def test_progress_and_estimated_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate uses typical times first, then this machine's pace, then each measurement's last time."""
    clock, announced = Clock(), list[str]()
    monkeypatch.setattr(rounds, "time", clock)

    def takes(typical_s: float) -> Callable[[], float]:
        """A measurement on a machine that takes twice as long."""

        def measure() -> float:
            clock.now += 2 * typical_s
            return typical_s

        return measure

    series = [
        Series("speed, mlp fp32", {"ours": takes(10), "theirs": takes(30)}, 2, typical_s=20),
        Series("growth", {"1": takes(100)}, 1, typical_s=100),
    ]
    estimate = TimeEstimate(series, announced.append)
    assert [estimate.run(each) for each in series] == [[{"ours": 10, "theirs": 30}] * 2, [{"1": 100}]]
    assert announced == [
        "speed, mlp fp32, round 1 of 2: ours; 1 of 5, about 3 min left",
        "speed, mlp fp32, round 1 of 2: theirs; 2 of 5, about 3 min left",
        "speed, mlp fp32, round 2 of 2: ours; 3 of 5, about 5 min left",
        "speed, mlp fp32, round 2 of 2: theirs; 4 of 5, about 4 min left",
        "growth, round 1 of 1: 1; 5 of 5, about 3 min left",
    ]
    assert estimate.left_s() == 0
    assert [rounds.in_words(seconds) for seconds in (89, 91, 3570, 5400)] == [
        "89 s",
        "2 min",
        "1 h 0 min",
        "1 h 30 min",
    ]


def test_parts_from_command_line(tmp_path: Path) -> None:
    """Real contestants, a few steps each."""
    command = ["bench", "speed", "breakdown", "--net", "mlp", "--steps", "20", "--repetitions", "1", "--out", "found"]
    done = run([*DIST_TRAIN, *command], tmp_path)
    assert done.returncode == 0, done.stderr
    (contest,) = json.loads((tmp_path / "found/speed.json").read_text())["found"]
    (only,) = contest["rounds"]
    assert only.keys() == {
        "dist_train", "dist_train compile", "resident", "dataloader", "accelerated", "lightning_trainer"
    }  # fmt: skip
    assert all(0.5 < found["accuracy"] < 0.95 and found["samples_per_s"] > 0 for found in only.values())
    assert [line.partition(", about ")[0] for line in done.stderr.splitlines() if ", round " in line] == [
        *(f"speed, mlp fp32, round 1 of 1: {name}; {number + 1} of 7" for number, name in enumerate(only)),
        "breakdown, round 1 of 1: mlp; 7 of 7",
    ]
    (probed,) = json.loads((tmp_path / "found/breakdown.json").read_text())["found"]["mlp"]
    assert probed.keys() >= {"forward", "backward", "whole step"}


def test_table_of_a_gpu() -> None:
    lines = PARTS["gpu"].table(ON_GPU)
    assert (
        "| mlp, fp32 | dist_train graph | 1.000 | 2.00x (2.00 to 3.00) | 0.50x (0.50 to 0.50) | 3.0 | 0.0 | 0.5 |"
        in lines
    )
    assert "| mlp, fp32 | bare loop | 2.200 |  | 0.25x (0.17 to 0.25) |  |  |  |" in lines


def test_gpu_part_needs_a_gpu() -> None:
    refused = CliRunner().invoke(main, ["bench", "gpu"])
    assert refused.exit_code == 2
    assert refused.output == "error: bench gpu: no CUDA device is available. The other parts run on a CPU.\n"
