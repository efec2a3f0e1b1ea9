"""Time accounting: every second of a run has exactly one use, over all attempts."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from dist_train.config.loading import parse_config
from dist_train.runs.attempt import begin_attempt
from dist_train.runs.directory import RunDir
from dist_train.runs.time_accounting import TimeAccounting, effective_ratio
from support.clock import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock(100.0)
    for reader in ("perf_counter", "monotonic", "time"):
        monkeypatch.setattr(time, reader, fake.time)
    return fake


def test_totals_of_first_attempt(clock: Clock) -> None:
    accounting = TimeAccounting({}, down_s=0.0, reached=0, started=90.0)
    clock.now = 103
    accounting.switch_to("train")
    clock.now = 110
    accounting.record_step(50, data_wait_s=2.0)
    accounting.switch_to("evaluate")
    clock.now = 111
    accounting.switch_to("train")
    clock.now = 115
    accounting.record_step(80, data_wait_s=2.5)
    assert accounting.totals() == {
        "train": 8.5, "again": 0.0, "data": 2.5, "evaluate": 1.0, "save": 0.0, "start": 13.0, "down": 0.0
    }  # fmt: skip
    assert effective_ratio(accounting.totals()) == pytest.approx(8.5 / 25)


def test_repeated_steps_are_not_progress(clock: Clock) -> None:
    accounting = TimeAccounting({"train": 30.0, "start": 10.0}, down_s=5.0, reached=80, started=90.0)
    accounting.record_step(60, 0.0)  # resumed there
    accounting.switch_to("train")
    clock.now = 102
    accounting.record_step(70, 0.0)
    clock.now = 105
    accounting.record_step(80, 0.0)
    clock.now = 109
    assert accounting.totals() == {
        "train": 34.0, "again": 5.0, "data": 0.0, "evaluate": 0.0, "save": 0.0, "start": 20.0, "down": 5.0
    }  # fmt: skip


def test_data_waits_of_warm_up_count_as_start(clock: Clock) -> None:
    accounting = TimeAccounting({}, down_s=0.0, reached=0, started=90.0)
    accounting.record_step(0, data_wait_s=4.0)
    accounting.switch_to("train")
    clock.now = 101
    accounting.record_step(9, data_wait_s=4.5)
    assert {use: spent for use, spent in accounting.totals().items() if spent} == {
        "train": 0.5,
        "data": 0.5,
        "start": 10.0,
    }


def test_clock_that_is_set_back_removes_no_time(clock: Clock) -> None:
    assert TimeAccounting({"down": 7.0}, down_s=-3600.0, reached=0, started=100.0).totals()["down"] == 7.0


def test_no_time_is_lost_between_attempts(tmp_path: Path, clock: Clock) -> None:
    """The sum over all uses is the wall time since the first start."""
    for number in range(3):
        run_dir = RunDir(tmp_path)
        run_dir.logs.mkdir(exist_ok=True)
        begin_attempt(run_dir, parse_config({}), "id")
        clock.now += 1
        run_dir.status.update(state="TRAINING", step=10 * number)
        clock.now += 2
        run_dir.status.update(state="TRAINING", step=10 * number + 5)
        clock.now += 4  # killed, then down
    status = json.loads(run_dir.status.path.read_text())
    assert status["attempt"] == 3
    assert (status["seconds"]["start"], status["seconds"]["train"], status["seconds"]["down"]) == (3, 6, 8)
    assert sum(status["seconds"].values()) == status["heartbeat"] - 100


def test_short_attempts_keep_highest_step(tmp_path: Path, clock: Clock) -> None:
    """The third attempt repeats steps of the first."""
    for reached in (1000, None, None):
        run_dir = RunDir(tmp_path)
        run_dir.logs.mkdir(exist_ok=True)
        begin_attempt(run_dir, parse_config({}), "id")
        if reached:
            run_dir.status.update(state="TRAINING", step=reached)
    run_dir.status.update(state="TRAINING", step=500)
    clock.now += 5
    run_dir.status.update(state="SAVING", step=900)
    assert run_dir.status.read()["seconds"]["again"] == 5


def test_brief_state_is_counted_but_not_written(tmp_path: Path, clock: Clock) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.logs.mkdir()
    begin_attempt(run_dir, parse_config({}), "id")
    run_dir.status.update(state="TRAINING", step=1)
    written = run_dir.status.path.read_bytes()
    run_dir.status.record(state="SAVING", step=2)
    clock.now += 3
    run_dir.status.record(state="TRAINING", step=2)
    clock.now += 5
    assert run_dir.status.path.read_bytes() == written
    run_dir.status.update()
    status = run_dir.status.read()
    assert (status["state"], status["step"]) == ("TRAINING", 2)
    assert (status["seconds"]["save"], status["seconds"]["train"]) == (3, 5)


def test_queue_time_counts_as_down(tmp_path: Path, clock: Clock) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.logs.mkdir()
    run_dir.slurm_json.write_text(json.dumps({"job": "1", "submitted": clock.now - 60}))
    begin_attempt(run_dir, parse_config({}), "id")
    assert run_dir.status.read()["seconds"]["down"] == 60


def test_effective_ratio_with_interruptions_every_three_hours() -> None:
    """As reported for Llama 3 on 16 384 GPUs: 10 s for a restart, and on average half of save_every=30 s repeated."""
    interval, restart, repeated = 3 * 3600.0, 10.0, 15.0
    assert effective_ratio({"train": interval - restart - repeated, "start": restart, "again": repeated}) >= 0.997
