"""Stop, save, delete and restore from the page: what the command line does, refused where it would lose something."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from dist_train.errors import RunDirError
from dist_train.launch.resume import is_starting, resume
from dist_train.runs import deleted_runs
from dist_train.training.provenance import recorded_environment
from support.page import SAME_ORIGIN, client_of, write_run
from support.patience import wait_until


def test_stop_and_save_leave_the_requests_that_a_run_reads(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, "run", "TRAINING", 10)
    client, _ = client_of(tmp_path, tmp_path)
    for action, file in (("stop", run_dir.stop_request_file), ("save", run_dir.save_request_file)):
        for _ in range(2):  # a double click
            answer = client.post(f"/jobs/run/{action}", headers=SAME_ORIGIN)
            assert (answer.status_code, answer.headers["location"]) == (303, f"../run?done={action}")
        assert file.exists()
    assert "stops after its current step" in client.get("/jobs/run?done=stop").text
    assert "whatever" not in client.get("/jobs/run?done=whatever").text


@pytest.mark.parametrize("action", ["stop", "save", "resume"])
def test_what_does_not_apply_is_refused(action: str, tmp_path: Path) -> None:
    write_run(tmp_path, "run")
    client, _ = client_of(tmp_path, tmp_path)
    answer = client.post(f"/jobs/run/{action}", headers=SAME_ORIGIN)
    assert answer.status_code == 409
    assert "FINISHED" in answer.text
    assert client.post("/jobs/run/explode", headers=SAME_ORIGIN).status_code == 404
    assert client.post("/jobs/none/stop", headers=SAME_ORIGIN).status_code == 404


@pytest.mark.parametrize("state", ["TRAINING", "SILENT"])
def test_a_run_that_may_be_running_is_not_deleted(state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, "run", "TRAINING", 10)
    if state == "SILENT":
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 300)
    client, _ = client_of(tmp_path, tmp_path)
    answer = client.post("/jobs/run/delete", headers=SAME_ORIGIN)
    assert answer.status_code == 409
    assert f"{state}. Stop it first." in answer.text
    assert (tmp_path / "run" / "config.yaml").exists()


def test_a_run_that_a_start_has_locked_is_not_deleted(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, "run")
    run_dir.lock()
    with pytest.raises(RunDirError, match="is in use"):
        deleted_runs.delete(tmp_path / "run")
    run_dir.unlock()
    deleted_runs.delete(tmp_path / "run")


def test_a_deleted_run_comes_back_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    run_dir = write_run(folder, "lr=0.1 x")
    before = {path.name: path.read_bytes() for path in run_dir.path.iterdir() if path.is_file()}
    client, _ = client_of(folder, tmp_path)
    client.get("/")
    assert client.post("/jobs/lr%3D0.1%20x/delete", headers=SAME_ORIGIN).status_code == 303
    assert "lr=0.1 x" not in client.get("/").text
    assert "lr=0.1 x" in client.get("/bin").text
    [deleted] = deleted_runs.find_deleted(folder)
    write_run(folder, "lr=0.1 x")
    entry = {"entry": deleted.path.name}
    assert client.post("/bin/restore", data=entry, headers=SAME_ORIGIN).status_code == 409  # the name is taken
    deleted_runs.delete(folder / "lr=0.1 x")
    assert client.post("/bin/restore", data=entry, headers=SAME_ORIGIN).status_code == 303
    after = {path.name: path.read_bytes() for path in run_dir.path.iterdir() if path.is_file()}
    assert {name: after[name] for name in before if name != ".lock"} == {
        name: content for name, content in before.items() if name != ".lock"
    }
    assert client.post("/bin/restore", data={"entry": "../../etc"}, headers=SAME_ORIGIN).status_code == 409


def test_the_bin_is_emptied_after_a_day_or_by_the_button_and_never_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, now = tmp_path / "runs", time.time()
    write_run(folder, "old")
    deleted_runs.delete(folder / "old")
    monkeypatch.setattr(time, "time", lambda: now + 23.9 * 3600)
    client, _ = client_of(folder, tmp_path)
    client.get("/")
    assert [run.name for run in deleted_runs.find_deleted(folder)] == ["old"]
    monkeypatch.setattr(time, "time", lambda: now + 24.1 * 3600)
    assert deleted_runs.empty(folder, deleted_runs.KEPT_S) == 1
    write_run(folder, "new")
    deleted_runs.delete(folder / "new")
    assert client.post("/bin/empty", headers=SAME_ORIGIN).status_code == 303
    assert list(deleted_runs.find_deleted(folder)) == []


def test_what_one_run_refuses_does_not_keep_the_others(tmp_path: Path) -> None:
    for name, state in (("a", "TRAINING"), ("b", "FINISHED"), ("c", "TRAINING")):
        write_run(tmp_path, name, state, 10)
    client, _ = client_of(tmp_path, tmp_path)
    answer = client.post("/act/stop", data={"run": ["a", "b", "c", "nothing"]}, headers=SAME_ORIGIN)
    assert answer.status_code == 409
    assert "b is not running: FINISHED" in answer.text
    assert (tmp_path / "a" / "STOP").exists()
    assert (tmp_path / "c" / "STOP").exists()


def test_a_run_of_several_machines_is_not_resumed_on_one(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, "run", "INTERRUPT", 10)
    run_dir.write_provenance({"num_nodes": 2})
    with pytest.raises(RunDirError, match="several machines"):
        resume(tmp_path / "run")


def test_a_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, "run", "INTERRUPT", 10)
    run_dir.write_provenance({"num_nodes": 1, "cwd": str(tmp_path / "gone")})
    with pytest.raises(RunDirError, match="gone, which does not exist"):
        resume(tmp_path / "run")
    assert not is_starting(run_dir)


def test_a_start_that_fails_is_shown_with_what_it_printed(tmp_path: Path) -> None:
    """A config that no longer loads: the process ends before it has a status."""
    run_dir = write_run(tmp_path, "run", "INTERRUPT", 10)
    run_dir.config.write_text("seed: nothing\n")
    client, _ = client_of(tmp_path, tmp_path)
    assert client.post("/jobs/run/resume", headers=SAME_ORIGIN).status_code == 303
    wait_until(lambda: not is_starting(run_dir), "end of the start")
    text = client.get("/jobs/run").text
    assert "The last start ended before it trained" in text
    assert "seed" in text.split('id="not-started"')[1].split("</section>")[0]


def test_the_environment_recorded_holds_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "SECRET")
    monkeypatch.setenv("DIST_TRAIN_LAUNCHER_PID", "1")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    recorded = recorded_environment(os.environ)
    assert recorded["WANDB_PROJECT"] == "mine"
    assert not {"WANDB_API_KEY", "DIST_TRAIN_LAUNCHER_PID"} & recorded.keys()


def test_names_in_the_bin_do_not_collide(tmp_path: Path) -> None:
    for _ in range(3):
        write_run(tmp_path, "same")
        deleted_runs.delete(tmp_path / "same")
    assert [run.name for run in deleted_runs.find_deleted(tmp_path)] == ["same"] * 3
