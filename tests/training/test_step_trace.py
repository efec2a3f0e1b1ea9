"""`profile`: a file for each rank with the chosen steps and nothing else; the run stays the same."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from dist_train.runs.directory import RunDir
from dist_train.web.outputs import list_files
from support.ranks import train_on_ranks
from support.run_files import assert_bit_identical

SETTINGS: dict[str, Any] = {
    "data": {"name": "support.user_sets:Jittered"},
    "model": {"name": "mlp", "args": {"image_size": 8, "hidden": 16}},
    "global_batch_size": 12,
    "train_for": "8 steps",
    "log_every": 1,
    "eval_every": 0,
    "save_every": "2 steps",
    "keep_last": 50,
    "final_train_eval": False,
}
TRACED = SETTINGS | {"profile": "3 steps from 2"}


def traces(run_dir: Path) -> list[str]:
    return sorted(path.name.removesuffix(".json.gz") for path in (run_dir / "profile").iterdir())


def read(run_dir: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gzip.decompress((run_dir / f"profile/{name}.json.gz").read_bytes()))
    return found


def losses_in(trace: dict[str, Any]) -> int:
    return sum(event["name"] == "aten::cross_entropy_loss" for event in trace["traceEvents"])


def test_each_rank_traces_its_steps_and_nothing_else(tmp_path: Path) -> None:
    """Here two micro-batches a step, and an evaluation between the second and the third step."""
    settings = {"per_device_batch_size": 3, "eval_every": "4 steps", "save_every": "4 steps"}
    train_on_ranks(SETTINGS | settings, tmp_path / "plain", world_size=2)
    train_on_ranks(TRACED | settings, tmp_path / "traced", world_size=2)
    assert_bit_identical(tmp_path / "traced", tmp_path / "plain")
    assert not (tmp_path / "plain/profile").exists()
    expected = [f"rank_0000{rank}_steps_{steps}" for rank in (0, 1) for steps in ("3-4", "5-5")]
    assert traces(tmp_path / "traced") == expected
    for name in expected:
        trace = read(tmp_path / "traced", name)
        assert losses_in(trace) == (4 if name.endswith("3-4") else 2)
        assert trace["distributedInfo"]["rank"] == int(name[9])
    assert len([name for name, _ in list_files(RunDir(tmp_path / "traced")) if name.startswith("profile/")]) == 4
    log = (tmp_path / "traced/logs/rank_00000.log").read_text()
    assert f"traces are in {tmp_path / 'traced/profile'}: open one at https://ui.perfetto.dev" in log


def test_resume_goes_on_with_a_trace_and_repeats_none(tmp_path: Path) -> None:
    """The run is stopped inside the window, then after it, then goes back to a checkpoint inside it."""
    train_on_ranks(SETTINGS, tmp_path / "whole")
    for stop_after, expected in ((3, ["3-3"]), (6, ["3-3", "4-4", "5-5"])):
        train_on_ranks(TRACED, tmp_path / "parts", stop_after=stop_after)
        assert traces(tmp_path / "parts") == [f"rank_00000_steps_{steps}" for steps in expected]
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts/profile").iterdir()}
    for step in (4, 6):
        (tmp_path / f"parts/checkpoints/step_{step:08d}/manifest.json").write_text("damaged")
    train_on_ranks(TRACED, tmp_path / "parts")
    assert "resumed at step 3" in (tmp_path / "parts/logs/rank_00000.log").read_text()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "parts/profile").iterdir()} == written
    assert_bit_identical(tmp_path / "parts", tmp_path / "whole")


def test_trace_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/profile").write_text("in the way")
    train_on_ranks(TRACED, tmp_path / "run")
    assert "rank_00000_steps_5-5.json.gz cannot be written" in (tmp_path / "run/logs/rank_00000.log").read_text()


def test_steps_after_the_end_are_said_to_be_missing(tmp_path: Path) -> None:
    train_on_ranks(SETTINGS | {"profile": "3 steps from 8"}, tmp_path / "run")
    log = (tmp_path / "run/logs/rank_00000.log").read_text()
    assert "profile=3 steps from 8: the run ends after 8 steps, so nothing is traced" in log
    assert not (tmp_path / "run/profile").exists()
