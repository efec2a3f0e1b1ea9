"""The run directory: one owner, numbered attempts, complete files, and errors that name an alternative."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_train.atomic_files import to_json, write_json
from dist_train.config.loading import parse_config
from dist_train.distributed.process_info import REQUEUED
from dist_train.errors import ConfigError, RunDirError
from dist_train.launch.machines import stop_run_to_rejoin
from dist_train.runs import heartbeat
from dist_train.runs.attempt import begin_attempt
from dist_train.runs.directory import RunDir
from dist_train.runs.status_file import CLEAN_ENDS
from support.run_files import contents

CONFIG = parse_config({})


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create()
    return run


def begin_next_attempt(path: Path) -> RunDir:
    run = RunDir(path)
    begin_attempt(run, CONFIG, wandb_id="second")
    return run


# --- one owner ---------------------------------------------------------------------------------------------------

HOLD = """
import sys
import time
from pathlib import Path
from dist_train.config.loading import parse_config
from dist_train.runs.attempt import begin_attempt
from dist_train.runs.directory import RunDir
run = RunDir(Path(sys.argv[1]))
run.lock()
begin_attempt(run, parse_config({}), "x")
print("held", flush=True)
sys.stdin.readline()
"""


def test_second_process_is_refused_until_first_ends(run: RunDir) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunDirError, match=rf"in use by process {holder.pid} on .* \(attempt 1, state STARTING\)"):
            run.lock()
        holder.kill()  # SIGKILL also releases the lock
    run.lock()
    run.unlock()


@pytest.mark.parametrize(
    ("job", "restart", "refused"), [("7", "1", False), ("7", "0", True), ("8", "1", True), (None, "1", True)]
)
def test_requeued_job_takes_over_from_its_earlier_start(
    job: str | None, restart: str, refused: bool, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The earlier start survives where the controller cannot see it, and still holds the lock."""
    earlier = os.environ | {"SLURM_JOB_ID": "7"}
    command = [sys.executable, "-c", HOLD, str(run.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=earlier) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        if job is not None:
            monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
        if refused:
            with pytest.raises(RunDirError, match="in use"):
                run.lock()
        else:
            run.lock()
            begin_attempt(run, CONFIG, wandb_id="x")
            assert run.status.attempt == 2
        holder.kill()


def test_older_attempt_writes_no_metrics(run: RunDir) -> None:
    begin_attempt(run, CONFIG, wandb_id="x")
    run.append_metrics({"step": 1})
    begin_next_attempt(run.path)
    with pytest.raises(RunDirError, match="superseded"):
        run.append_metrics({"step": 2})
    assert list(run.metrics.read()) == [{"step": 1}]


def test_attempts_are_numbered_and_older_one_is_superseded(run: RunDir) -> None:
    begin_attempt(run, CONFIG, wandb_id="first")
    run.status.update(state="TRAINING", step=3)
    later = begin_next_attempt(run.path)
    assert (run.status.attempt, later.status.attempt) == (1, 2)
    status = later.status.read()
    assert (status["attempt"], status["wandb_id"], status["state"]) == (2, "first", "STARTING")
    with pytest.raises(RunDirError, match="attempt 1 was superseded by attempt 2"):
        run.status.update(state="FINISHED")
    assert run.status.read() == status
    later.status.update(state="TRAINING")
    assert later.status.read()["heartbeat"] >= status["heartbeat"]


def test_status_is_written_once_per_second(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fields set in between are kept; a new state is written at once."""
    monkeypatch.setattr(heartbeat, "AT_MOST_EVERY_S", 1000.0)
    begin_attempt(run, CONFIG, "id")
    run.status.update(state="TRAINING", step=1)
    run.status.update(step=2, metrics={"train/loss": 0.5})
    assert run.status.read()["step"] == 1
    monkeypatch.setattr(heartbeat, "AT_MOST_EVERY_S", 0.0)
    run.status.update()
    assert (run.status.read()["step"], run.status.read()["metrics"]) == (2, {"train/loss": 0.5})


def test_attempt_removes_error_and_result_of_previous_one(run: RunDir) -> None:
    for stale in (run.error, run.result):
        write_json(stale, {})
    begin_attempt(run, CONFIG, wandb_id="x")
    assert not run.error.exists()
    assert not run.result.exists()


# --- stop requests -----------------------------------------------------------------------------------------------


def request_stop(run: RunDir, age_s: float) -> None:
    run.stop_request_file.touch()
    modified = run.stop_request_file.stat().st_mtime - age_s
    os.utime(run.stop_request_file, (modified, modified))


def begin_a_minute_after_the_command(path: Path) -> RunDir:
    """As a start does that waits for a lock, a data set or other ranks before its attempt."""
    run = RunDir(path)
    begin_attempt(run, CONFIG, wandb_id="x", asked_at=time.perf_counter() - 60)
    return run


@pytest.mark.parametrize(("age_s", "holds"), [(30, True), (90, False)])
def test_stop_request_holds_from_start_of_command(age_s: float, holds: bool, run: RunDir) -> None:
    request_stop(run, age_s)
    assert begin_a_minute_after_the_command(run.path).stop_request_file.exists() == holds


@pytest.mark.parametrize(("age_s", "holds"), [(300, True), (900, False)])
@pytest.mark.parametrize("how", ["requeued", "submitted", "restart.sh"])
def test_stop_request_before_command_holds_for_restarts(
    how: str, age_s: float, holds: bool, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds for a job from its submission on, and for a restart from the last status of the earlier start on."""
    if how != "restart.sh":
        monkeypatch.setenv("SLURM_JOB_ID", "7")
    if how == "submitted":
        write_json(run.slurm_json, {"job": "7"})
    else:
        begin_attempt(run, CONFIG, wandb_id="x")
        monkeypatch.setenv("SLURM_RESTART_COUNT" if how == "requeued" else REQUEUED, "1")
    for path in (run.slurm_json, run.status.path):
        if path.exists():
            os.utime(path, (path.stat().st_mtime - 600,) * 2)
    request_stop(run, age_s)
    assert begin_a_minute_after_the_command(run.path).stop_request_file.exists() == holds


def test_binary_stop_file_is_stop_request(run: RunDir) -> None:
    run.stop_request_file.write_bytes(b"\xff\xfe")
    assert run.take_request(run.stop_request_file) is not None
    assert not run.stop_request_file.exists()


@pytest.mark.parametrize(("text", "stays"), [("", True), ("INTERRUPT", True), ("PREEMPTED\n", False)])
def test_joining_machine_removes_only_its_own_stop_request(text: str, stays: bool, run: RunDir) -> None:
    write_json(run.status.path, {"state": "PREEMPTED"})
    run.stop_request_file.write_text(text)
    stop_run_to_rejoin(run)
    assert run.stop_request_file.exists() == stays


# --- another run -------------------------------------------------------------------------------------------------


def test_folder_without_checkpoints_accepts_another_run(run: RunDir) -> None:
    """It starts from zero with its own id: W&B would append it to the other run and drop steps before its last one."""
    begin_attempt(run, CONFIG, wandb_id="first")
    run.status.update(state="TRAINING", step=7)
    for settings, wandb_id in (({}, "first"), ({"seed": 1}, "second")):
        later = RunDir(run.path)
        begin_attempt(later, parse_config(settings), wandb_id="second")
        status = later.status.read()
        assert (status["wandb_id"], status["reached"]) == (wandb_id, 7 if wandb_id == "first" else 0)


def test_another_config_is_refused_and_nothing_is_written(run: RunDir) -> None:
    begin_attempt(run, CONFIG, wandb_id="x")
    (run.checkpoints / "step_00000001").mkdir(parents=True)
    before = contents(run.path)
    other = parse_config({"optimizer": {"lr": 0.5}, "seed": 7, "device": "cpu"})
    with pytest.raises(
        ConfigError, match=r"(?s)lr: 0\.001 in the run, 0\.5 now\n  seed: 0 in the run, 7 now\n.*--run-name"
    ):
        run.check_config(other)
    run.check_config(parse_config({"device": "cpu"}))  # may differ
    assert contents(run.path) == before


def test_recorded_precision_may_be_set_explicitly(run: RunDir) -> None:
    """A launcher chose it and the settings do not set it. Another precision is refused."""
    begin_attempt(run, CONFIG, wandb_id="x")
    assert run.precision is None  # no checkpoint yet
    (run.checkpoints / "step_00000001").mkdir(parents=True)
    write_json(run.run_json, {"mixed_precision": "bf16"})
    assert run.precision == "bf16"
    run.check_config(parse_config({"mixed_precision": "bf16"}))
    with pytest.raises(ConfigError, match="mixed_precision: null in the run, 'no' now"):
        run.check_config(parse_config({"mixed_precision": "no"}))


def test_resume_without_precision_setting_is_same_run(run: RunDir) -> None:
    bf16 = parse_config({"mixed_precision": "bf16", "device": "cpu"})
    begin_attempt(run, bf16, wandb_id="x")
    (run.checkpoints / "step_00000001").mkdir(parents=True)
    run.status.update(state="TRAINING", step=7)
    begin_attempt(run, CONFIG, wandb_id="y")
    status = run.status.read()
    assert (status["wandb_id"], status["reached"], status["attempt"]) == ("x", 7, 2)


def test_too_long_name_is_refused_with_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="cannot be written: File name too long"):
        _ = RunDir(tmp_path / ("x" * 300)).precision


# --- metrics -----------------------------------------------------------------------------------------------------


def lines(*steps: int) -> list[dict[str, object]]:
    return [{"step": step, "train/loss": step / 3, "note": "\u00fc\n"} for step in steps]


def test_metrics_are_read_back_and_cut_at_checkpoint(run: RunDir) -> None:
    assert (list(run.metrics.read()), run.metrics.cut(5)) == ([], 0)
    for line in lines(1, 2, 3, 4):
        run.append_metrics(line)
    assert list(run.metrics.read()) == lines(1, 2, 3, 4)
    before = run.metrics.path.read_bytes()
    assert run.metrics.cut(4) == 0
    assert run.metrics.path.read_bytes() == before
    assert not run.metrics.discarded.exists()
    assert run.metrics.cut(2) == 2
    assert list(run.metrics.read()) == lines(1, 2)
    assert run.metrics.path.read_bytes() + run.metrics.discarded.read_bytes() == before
    assert run.metrics.cut(1) == 1
    assert [json.loads(line)["step"] for line in run.metrics.discarded.read_text().splitlines()] == [3, 4, 2]


def test_repeated_evaluation_has_one_line(run: RunDir) -> None:
    """Stopped while evaluating, resumed, evaluated, killed before the next save: resumed at the same step again."""
    val: list[dict[str, object]] = [{"step": 2, "val/loss": 0.5}]
    for line in (*lines(1, 2), *val, *lines(3)):
        run.append_metrics(line)
    assert run.metrics.cut(2, evaluation_pending=True) == 2
    assert list(run.metrics.read()) == lines(1, 2)


@pytest.mark.parametrize("left", [1, 9, 20])
def test_incomplete_last_line_is_ignored_and_cut(left: int, run: RunDir) -> None:
    for line in lines(1, 2):
        run.append_metrics(line)
    incomplete = (to_json(lines(3)[0]) + "\n")[:left]
    with run.metrics.path.open("a") as file:
        file.write(incomplete)
    assert list(run.metrics.read()) == lines(1, 2)
    run.metrics.cut(2)
    run.append_metrics(lines(3)[0])
    assert list(run.metrics.read()) == lines(1, 2, 3)
    assert run.metrics.discarded.read_text() == incomplete + "\n"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_is_strict(value: float, run: RunDir) -> None:
    run.append_metrics({"step": 1})
    before = contents(run.path)
    with pytest.raises(ValueError, match="JSON"):
        run.append_metrics({"step": 2, "x": value})
    with pytest.raises(ValueError, match="JSON"):
        write_json(run.result, {"x": value})
    assert contents(run.path) == before


def test_constructor_does_no_io(tmp_path: Path) -> None:
    RunDir(tmp_path / "run").check_config(CONFIG)
    assert RunDir(tmp_path / "run").status.read() == {}
    assert list(tmp_path.iterdir()) == []
    assert set(CLEAN_ENDS) == {"FINISHED", "INTERRUPT", "PREEMPTED"}


@pytest.mark.parametrize("garbage", ["garbage{\n", "\0\0\0\n", '{"no step": 1}\n', '{"step": 3, "train'])
def test_garbage_at_end_of_metrics_is_cut(garbage: str, run: RunDir) -> None:
    """Whatever a power cut leaves, the lines before it stay unchanged and the run continues."""
    for step in (1, 2):
        run.append_metrics({"step": step, "train/loss": 0.1})
    good = run.metrics.path.read_text()
    run.metrics.path.write_text(good + garbage)
    assert run.metrics.cut(2) == 1
    assert run.metrics.path.read_text() == good
    assert [line["step"] for line in run.metrics.read()] == [1, 2]


# Invalid lines: wrong bytes, wrong types, deeper nesting than a parser can handle.
DAMAGED = [
    b"garbage{", b"\0\0\0", b"\xff\xfe\x85 \x0c", b"[1]", b"null", b"", b"[" * 9999, b'{"no step": 1}',
    b'{"step": 1e999}', b'{"step": null}', b'{"step": "2"}', b'{"step": 2, "train/lo{"step": 2}',
]  # fmt: skip


@pytest.mark.parametrize("damaged", DAMAGED, ids=repr)
@pytest.mark.parametrize("index", [0, 1, 3])
def test_only_damaged_line_is_discarded(
    damaged: bytes, index: int, run: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    for line in lines(1, 2, 3, 4):
        run.append_metrics(line)
    intact = run.metrics.path.read_bytes().splitlines(keepends=True)
    run.metrics.path.write_bytes(b"".join([*intact[:index], damaged + b"\n", *intact[index:]]))
    assert list(run.metrics.read()) == lines(1, 2, 3, 4)
    assert run.metrics.cut(3) == 1
    assert run.metrics.path.read_bytes() == b"".join(intact[:3])
    assert run.metrics.discarded.read_bytes() == damaged + b"\n" + intact[3]
    (warning,) = caplog.messages
    assert warning.startswith(f"{run.metrics.path} was damaged in line {index + 1}: moved to metrics.discarded")
    assert run.metrics.cut(3) == 0


def test_lines_are_kept_while_disk_is_full(run_dir: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    """/dev/full rejects writes like a full disk. Pending lines are written once, in order."""
    run_dir.append_metrics({"step": 1})
    path, run_dir.metrics.path = run_dir.metrics.path, Path("/dev/full")
    for step in (2, 3):
        run_dir.append_metrics({"step": step})
    with pytest.raises(OSError, match="No space left"):
        run_dir.metrics.flush()
    run_dir.metrics.path = path
    run_dir.append_metrics({"step": 4})
    assert [line["step"] for line in run_dir.metrics.read()] == [1, 2, 3, 4]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
