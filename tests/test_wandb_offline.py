"""A run without account and network: W&B's own files hold all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ranks import join_group, run_on_ranks

from dist_train.config_file import parse_config
from dist_train.distributed import World
from dist_train.run_dir import RunDir
from dist_train.tracking import Tracker

FIRST: list[dict[str, Any]] = [
    {"step": 2, "train/loss": 0.5, "train/grad_norm": None},
    {"step": 4, "train/loss": 0.25, "train/grad_norm": 1.5},
    {"step": 4, "val/accuracy": 0.9},
]
SECOND: list[dict[str, Any]] = [{"step": 6, "train/loss": 0.125}]


def log_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    os.environ["WANDB_MODE"] = "offline"
    run_dir = RunDir(path)
    config = parse_config({"optimizer": {"lr": 0.125}, "tracking": {"project": "test", "tags": ["a"]}})
    join_group("wandb")
    world = World.join(config)  # Accelerate's trackers want its state
    run_dir.begin_attempt(config, wandb_id="of this attempt")
    tracker = Tracker(
        run_dir, config, {"world_size": world.size, "device": "cpu", "mixed_precision": "no"}, enabled=True
    )
    for line in lines:
        tracker.log(line)
    tracker.finish({"test/accuracy": 0.75})


def attempt(run_dir: RunDir, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What W&B reads in the offline folder that one attempt made."""
    before = set(run_dir.path.glob("wandb/offline-run-*"))
    run_on_ranks(log_lines, run_dir.path, lines, world_size=1)
    (made,) = set(run_dir.path.glob("wandb/offline-run-*")) - before
    argv = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(made)]
    said = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout
    return [json.loads(line) for line in said.splitlines()]


def of_kind(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record[kind] for record in records if record["type"] == kind]


def without_own(items: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in items.items() if not name.startswith("_")}


def test_two_attempts_are_one_run_with_every_metric_at_its_step(run_dir: RunDir) -> None:
    history = []
    for records in (attempt(run_dir, FIRST), attempt(run_dir, SECOND)):
        run = of_kind(records, "run")[0]
        assert (run["run_id"], run["project"], run["display_name"]) == ("id", "test", "run")
        assert set(run["tags"]) == {"a", "world_size=1", "fp32", "cpu"}
        assert run["job_type"] == "train"
        assert any("optimizer.lr" in json.dumps(record) for record in records)
        assert any(record["update"].get("test/accuracy") == 0.75 for record in of_kind(records, "summary"))
        history += [(row["step"]["num"], without_own(row["item"])) for row in of_kind(records, "history")]
    # W&B keeps one row per step: the two lines of step 4 are one.
    assert history == [
        (2, {"step": 2, "train/loss": 0.5}),
        (4, {"step": 4, "train/loss": 0.25, "train/grad_norm": 1.5, "val/accuracy": 0.9}),
        (6, {"step": 6, "train/loss": 0.125}),
    ]
    assert list(run_dir.metrics.read()) == FIRST + SECOND
