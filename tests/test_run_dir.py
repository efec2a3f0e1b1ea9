"""The run directory: one owner, numbered attempts, whole files, and errors that say where to go instead."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dist_train import run_dir as module
from dist_train.config_file import parse_config
from dist_train.errors import ConfigError, RunDirError
from dist_train.run_dir import RunDir, to_json, write_json

CONFIG = parse_config({})


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "run")
    made.create()
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def attempt_of(path: Path) -> RunDir:
    made = RunDir(path)
    made.begin_attempt(CONFIG, wandb_id="second")
    return made


# --- one owner ---------------------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from dist_train.config_file import parse_config
from dist_train.run_dir import RunDir
run = RunDir(Path(sys.argv[1]))
run.lock()
run.begin_attempt(parse_config({}), "x")
print("held", flush=True)
sys.stdin.readline()
"""


def test_a_second_process_is_refused_until_the_first_is_gone(run: RunDir) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunDirError, match=rf"in use by process {holder.pid} on .* \(attempt 1, state STARTING\)"):
            run.lock()
        holder.kill()  # not even kill -9 leaves the directory locked
    run.lock()
    run.unlock()


def test_attempts_are_numbered_and_an_older_one_is_superseded(run: RunDir) -> None:
    run.begin_attempt(CONFIG, wandb_id="first")
    run.set_status(state="TRAINING", step=3)
    later = attempt_of(run.path)
    assert (run.attempt, later.attempt) == (1, 2)
    status = later.read_status()
    assert (status["attempt"], status["wandb_id"], status["state"]) == (2, "first", "STARTING")
    with pytest.raises(RunDirError, match="attempt 1 was superseded by attempt 2"):
        run.set_status(state="FINISHED")
    assert run.read_status() == status
    later.set_status(state="TRAINING")
    assert later.read_status()["heartbeat"] >= status["heartbeat"]


def test_an_attempt_clears_the_end_of_the_one_before(run: RunDir) -> None:
    for stale in (run.error, run.result):
        write_json(stale, {})
    run.begin_attempt(CONFIG, wandb_id="x")
    assert not run.error.exists()
    assert not run.result.exists()


def test_another_config_is_refused_and_nothing_changes(run: RunDir) -> None:
    run.begin_attempt(CONFIG, wandb_id="x")
    (run.checkpoints / "step_00000001").mkdir(parents=True)
    before = contents(run.path)
    other = parse_config({"optimizer": {"lr": 0.5}, "seed": 7, "device": "cpu"})
    with pytest.raises(ConfigError, match=r"(?s)lr: 0\.001 there, 0\.5 now\n  seed: 0 there, 7 now\n.*--run-name"):
        run.check_config(other)
    run.check_config(parse_config({"device": "cpu"}))  # free to differ
    assert contents(run.path) == before


# --- metrics -----------------------------------------------------------------------------------------------------


def lines(*steps: int) -> list[dict[str, object]]:
    return [{"step": step, "train/loss": step / 3, "note": "\u00fc\n"} for step in steps]


def test_metrics_read_back_and_are_cut_at_the_checkpoint(run: RunDir) -> None:
    assert (list(run.read_metrics()), run.cut_metrics(5)) == ([], 0)
    for line in lines(1, 2, 3, 4):
        run.append_metrics(line)
    assert list(run.read_metrics()) == lines(1, 2, 3, 4)
    before = run.metrics.read_bytes()
    assert run.cut_metrics(4) == 0
    assert run.metrics.read_bytes() == before
    assert not run.discarded.exists()
    assert run.cut_metrics(2) == 2
    assert list(run.read_metrics()) == lines(1, 2)
    assert run.metrics.read_bytes() + run.discarded.read_bytes() == before
    assert run.cut_metrics(1) == 1
    assert [json.loads(line)["step"] for line in run.discarded.read_text().splitlines()] == [3, 4, 2]


def test_an_evaluation_that_is_done_again_has_one_line(run: RunDir) -> None:
    """Stopped while evaluating, resumed, evaluated, killed before the next save: resumed at the same step once more."""
    val: list[dict[str, object]] = [{"step": 2, "val/loss": 0.5}]
    for line in (*lines(1, 2), *val, *lines(3)):
        run.append_metrics(line)
    assert run.cut_metrics(2, evaluation_pending=True) == 2
    assert list(run.read_metrics()) == lines(1, 2)


@pytest.mark.parametrize("left", [1, 9, 20])
def test_a_torn_last_line_is_left_out_and_cut(left: int, run: RunDir) -> None:
    for line in lines(1, 2):
        run.append_metrics(line)
    torn = (to_json(lines(3)[0]) + "\n")[:left]
    with run.metrics.open("a") as file:
        file.write(torn)
    assert list(run.read_metrics()) == lines(1, 2)
    run.cut_metrics(2)
    run.append_metrics(lines(3)[0])
    assert list(run.read_metrics()) == lines(1, 2, 3)
    assert run.discarded.read_text() == torn + "\n"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_is_strict(value: float, run: RunDir) -> None:
    run.append_metrics({"step": 1})
    before = contents(run.path)
    with pytest.raises(ValueError, match="JSON"):
        run.append_metrics({"step": 2, "x": value})
    with pytest.raises(ValueError, match="JSON"):
        write_json(run.result, {"x": value})
    assert contents(run.path) == before


def test_making_the_object_touches_nothing(tmp_path: Path) -> None:
    RunDir(tmp_path / "run").check_config(CONFIG)
    assert RunDir(tmp_path / "run").read_status() == {}
    assert list(tmp_path.iterdir()) == []
    assert set(module.CLEAN_ENDS) == {"FINISHED", "INTERRUPT", "PREEMPTED"}


@pytest.mark.parametrize("rubbish", ["garbage{\n", "\0\0\0\n", '{"no step": 1}\n', '{"step": 3, "train'])
def test_rubbish_in_the_metrics_is_set_aside(rubbish: str, run: RunDir) -> None:
    """Whatever a power cut left behind, the lines before it stay as they are and the run goes on."""
    for step in (1, 2):
        run.append_metrics({"step": step, "train/loss": 0.1})
    good = run.metrics.read_text()
    run.metrics.write_text(good + rubbish)
    assert run.cut_metrics(2) == 1
    assert run.metrics.read_text() == good
    assert [line["step"] for line in run.read_metrics()] == [1, 2]
