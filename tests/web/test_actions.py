"""Stop, save, delete and restore from the page: what the command line does, refused where it would lose something."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dist_train.atomic_files import write_json
from dist_train.distributed.process_info import surroundings
from dist_train.errors import RunDirError
from dist_train.launch.resume import resume
from dist_train.runs import deleted_runs
from dist_train.runs.start_lock import has_failed_to_start, hold_start_lock, is_starting
from dist_train.runs.summary import summarise
from support.page import SAME_ORIGIN, client_of, write_run
from support.patience import wait_until


def test_stop_and_save_write_request_files(tmp_path: Path) -> None:
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
def test_inapplicable_action_is_refused(action: str, tmp_path: Path) -> None:
    write_run(tmp_path, "run")
    client, _ = client_of(tmp_path, tmp_path)
    answer = client.post(f"/jobs/run/{action}", headers=SAME_ORIGIN)
    assert answer.status_code == 409
    assert "FINISHED" in answer.text
    assert client.post("/jobs/run/explode", headers=SAME_ORIGIN).status_code == 404
    assert client.post("/jobs/none/stop", headers=SAME_ORIGIN).status_code == 404


@pytest.mark.parametrize("state", ["TRAINING", "SILENT"])
def test_running_or_silent_run_is_not_deleted(state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, "run", "TRAINING", 10)
    if state == "SILENT":
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 300)
    client, _ = client_of(tmp_path, tmp_path)
    answer = client.post("/jobs/run/delete", headers=SAME_ORIGIN)
    assert answer.status_code == 409
    assert f"{state}. Stop it first." in answer.text
    assert (tmp_path / "run" / "config.yaml").exists()


def test_locked_run_is_not_deleted(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, "run")
    run_dir.lock()
    with pytest.raises(RunDirError, match="is in use"):
        deleted_runs.delete(tmp_path / "run")
    run_dir.unlock()
    deleted_runs.delete(tmp_path / "run")


def test_deleted_run_is_restored_unchanged(tmp_path: Path) -> None:
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


def test_bin_is_emptied_after_a_day_or_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, now = tmp_path / "runs", time.time()
    write_run(folder, "old")
    deleted_runs.delete(folder / "old")
    monkeypatch.setattr(time, "time", lambda: now + 23.9 * 3600)
    client, _ = client_of(folder, tmp_path)
    client.get("/")
    assert [run.name for run in deleted_runs.find_deleted(folder)] == ["old"]
    monkeypatch.setattr(time, "time", lambda: now + 24.1 * 3600)
    deleted_runs.empty(folder, deleted_runs.KEPT_S)
    assert list(deleted_runs.find_deleted(folder)) == []
    write_run(folder, "new")
    deleted_runs.delete(folder / "new")
    assert client.post("/bin/empty", headers=SAME_ORIGIN).status_code == 303
    assert list(deleted_runs.find_deleted(folder)) == []


def test_refusal_of_one_run_does_not_stop_others(tmp_path: Path) -> None:
    for name, state in (("a", "TRAINING"), ("b", "FINISHED"), ("c", "TRAINING")):
        write_run(tmp_path, name, state, 10)
    client, _ = client_of(tmp_path, tmp_path)
    answer = client.post("/act/stop", data={"run": ["a", "b", "c", "nothing"]}, headers=SAME_ORIGIN)
    assert answer.status_code == 409
    assert "b is not running: FINISHED" in answer.text
    assert (tmp_path / "a" / "STOP").exists()
    assert (tmp_path / "c" / "STOP").exists()


def test_run_of_several_machines_is_not_resumed_on_one(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, "run", "INTERRUPT", 10)
    run_dir.write_provenance({"num_nodes": 2})
    with pytest.raises(RunDirError, match="several machines"):
        resume(tmp_path / "run")


def test_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, "run", "INTERRUPT", 10)
    run_dir.write_provenance({"num_nodes": 1, "cwd": str(tmp_path / "gone")})
    with pytest.raises(RunDirError, match="gone, which does not exist"):
        resume(tmp_path / "run")
    assert not is_starting(run_dir)


def test_failed_start_shows_its_output(tmp_path: Path) -> None:
    """A config that no longer loads: the process ends before it has a status."""
    run_dir = write_run(tmp_path, "run", "INTERRUPT", 10)
    run_dir.config.write_text("seed: nothing\n")
    client, _ = client_of(tmp_path, tmp_path)
    assert client.post("/jobs/run/resume", headers=SAME_ORIGIN).status_code == 303
    wait_until(lambda: not is_starting(run_dir), "end of the start")
    text = client.get("/jobs/run").text
    assert "The last start ended before it trained" in text
    assert "seed" in text.split('id="not-started"')[1].split("</section>")[0]


def test_recorded_environment_has_no_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "SECRET")
    monkeypatch.setenv("DIST_TRAIN_LAUNCHER_PID", "1")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    recorded = surroundings()["environment"]
    assert recorded["WANDB_PROJECT"] == "mine"
    assert not {"WANDB_API_KEY", "DIST_TRAIN_LAUNCHER_PID"} & recorded.keys()


def test_names_in_bin_do_not_collide(tmp_path: Path) -> None:
    for _ in range(3):
        write_run(tmp_path, "same")
        deleted_runs.delete(tmp_path / "same")
    assert [run.name for run in deleted_runs.find_deleted(tmp_path)] == ["same"] * 3


def waiting_interpreter(folder: Path) -> Path:
    """Write a program to stand for a run's Python: it notes its environment, and ends when `folder`/go is there."""
    program = folder / "python"
    program.write_text(
        f"#!/bin/sh\nenv > {folder}/env.$$\necho began >> {folder}/began\n"
        f"while [ ! -e {folder}/go ]; do sleep 0.05; done\necho refused\n"
    )
    program.chmod(0o755)
    return program


def test_double_click_starts_once(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    run_dir = write_run(folder, "run", "INTERRUPT", 10)
    run_dir.write_provenance({"num_nodes": 1, "python": str(waiting_interpreter(tmp_path)), "cwd": str(tmp_path)})
    client, _ = client_of(folder, tmp_path)
    answers = [client.post("/jobs/run/resume", headers=SAME_ORIGIN).status_code for _ in range(3)]
    assert answers == [303, 409, 409]
    assert is_starting(run_dir)
    assert "STARTING" in client.get("/jobs/run").text
    answer = client.post("/jobs/run/delete", headers=SAME_ORIGIN)
    assert (answer.status_code, "STARTING. Stop it first." in answer.text) == (409, True)
    wait_until((tmp_path / "began").exists, "start")
    (tmp_path / "go").touch()
    wait_until(lambda: not is_starting(run_dir), "end of the start")
    assert (tmp_path / "began").read_text() == "began\n"
    assert "refused" in client.get("/jobs/run").text.split('id="not-started"')[1]
    assert client.post("/jobs/run/delete", headers=SAME_ORIGIN).status_code == 303
    assert client.post("/jobs/run/delete", headers=SAME_ORIGIN).status_code == 404  # a double click


def test_start_survives_killed_server(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    run_dir = write_run(folder, "run", "INTERRUPT", 10)
    run_dir.write_provenance({"num_nodes": 1, "python": str(waiting_interpreter(tmp_path)), "cwd": str(tmp_path)})
    code = "import os, sys; from pathlib import Path; from dist_train.launch.resume import resume; "
    code += "resume(Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    server = subprocess.run([sys.executable, "-c", code, str(run_dir.path)], start_new_session=True)
    assert server.returncode == -9
    client, _ = client_of(folder, tmp_path)  # of the next server
    wait_until((tmp_path / "began").exists, "start")
    assert is_starting(run_dir)
    assert "STARTING" in client.get("/jobs/run").text
    assert client.post("/jobs/run/resume", headers=SAME_ORIGIN).status_code == 409
    (tmp_path / "go").touch()
    wait_until(lambda: not is_starting(run_dir), "end of the start")


def test_start_with_status_is_neither_starting_nor_failed(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    run_dir = write_run(folder, "run", "INTERRUPT", 10)
    run_dir.write_provenance({"num_nodes": 1, "python": str(waiting_interpreter(tmp_path)), "cwd": str(tmp_path)})
    resume(run_dir.path)
    write_json(run_dir.status.path, run_dir.status.read() | {"state": "FINISHED"})
    client, _ = client_of(folder, tmp_path)
    assert not is_starting(run_dir)
    assert "STARTING" not in client.get("/jobs/run").text
    (tmp_path / "go").touch()
    with hold_start_lock(run_dir):  # waits for the launcher, which has printed something after the last status
        pass
    assert "not-started" not in client.get("/jobs/run").text


def test_resume_uses_environment_of_run_not_of_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that the run did not set stays unset: OMP_NUM_THREADS changes the bits of sums."""
    run_dir = write_run(tmp_path / "runs", "run", "INTERRUPT", 10)
    (tmp_path / "go").touch()
    run_dir.write_provenance(
        {"num_nodes": 1, "python": str(waiting_interpreter(tmp_path)), "cwd": str(tmp_path),
         "environment": {"WANDB_MODE": "offline"}}
    )  # fmt: skip
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("MINE", "kept")
    resume(run_dir.path)
    wait_until(lambda: has_failed_to_start(run_dir), "end of the start")
    [env] = [path.read_text().splitlines() for path in tmp_path.glob("env.*")]
    assert not any(line.startswith("OMP_NUM_THREADS") for line in env)
    assert {"WANDB_MODE=offline", "MINE=kept"} <= set(env)


def test_interpreter_that_is_gone_is_named(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "runs", "run", "INTERRUPT", 10)
    run_dir.write_provenance({"num_nodes": 1, "python": "/gone/python"})
    client, _ = client_of(tmp_path / "runs", tmp_path)
    answer = client.post("/jobs/run/resume", headers=SAME_ORIGIN)
    assert (answer.status_code, "/gone/python: No such file" in answer.text) == (409, True)
    assert client.get("/jobs/run").status_code == 200


def test_slurm_job_is_resubmitted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, text in {
        "sbatch": f"cat > /dev/null; echo $PWD $WANDB_MODE >> {tmp_path}/submitted; echo 42",
        "squeue": f"[ ! -e {tmp_path}/submitted ] || echo '42|PENDING|Priority|0:00'",
    }.items():
        (commands / name).write_text(f"#!/bin/sh\n{text}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    run_dir = write_run(tmp_path / "runs", "run", "ERROR", 10)
    (run_dir.path / "job.sbatch").write_text("#!/bin/bash\n")
    write_json(run_dir.slurm_json, {"job": "41", "submitted": 1.0})
    run_dir.write_provenance({"num_nodes": 2, "cwd": str(tmp_path), "environment": {"WANDB_MODE": "offline"}})
    client, _ = client_of(tmp_path / "runs", tmp_path)
    answers = [client.post("/jobs/run/resume", headers=SAME_ORIGIN) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [303, 409]
    assert "Job 42 of run waits or runs already" in answers[1].text
    assert (tmp_path / "submitted").read_text() == f"{tmp_path} offline\n"  # where and as it ran, and once
    answer = client.post("/jobs/run/delete", headers=SAME_ORIGIN)
    assert (answer.status_code, "waits in the queue" in answer.text) == (409, True)
    assert run_dir.config.exists()


def test_old_deleted_runs_are_removed_at_start_and_delete(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    for name in ("old", "new"):
        write_run(folder, name)
        deleted_runs.delete(folder / name)
    long_ago = time.time_ns() - int(1e9 * (deleted_runs.KEPT_S + 60))

    def age() -> None:
        for run in deleted_runs.find_deleted(folder):
            if run.name == "old":
                run.path.rename(run.path.with_name(f"{long_ago}-old"))

    def in_bin() -> list[str]:
        return [run.name for run in deleted_runs.find_deleted(folder)]

    age()
    client, _ = client_of(folder, tmp_path)
    wait_until(lambda: "empty_bin" not in [thread.name for thread in threading.enumerate()], "removal at the start")
    assert in_bin() == ["new"]
    write_run(folder, "old")
    deleted_runs.delete(folder / "old")
    age()
    write_run(folder, "third")
    client.get("/bin")
    assert in_bin() == ["new", "old"]  # looking removes nothing
    assert client.post("/jobs/third/delete", headers=SAME_ORIGIN).status_code == 303
    assert in_bin() == ["third", "new"]


def test_leftovers_of_killed_removal_are_removed(tmp_path: Path) -> None:
    half = tmp_path / ".bin" / ".removing_1-half"
    half.mkdir(parents=True)
    assert list(deleted_runs.find_deleted(tmp_path)) == []
    deleted_runs.empty(tmp_path, deleted_runs.KEPT_S)
    assert not half.exists()


def test_run_deleted_in_the_future_can_be_removed(tmp_path: Path) -> None:
    (tmp_path / ".bin" / f"{time.time_ns() + 10**15}-x").mkdir(parents=True)
    deleted_runs.empty(tmp_path, deleted_runs.KEPT_S)
    assert len(list(deleted_runs.find_deleted(tmp_path))) == 1
    deleted_runs.empty(tmp_path)
    assert list(deleted_runs.find_deleted(tmp_path)) == []


def test_run_killed_before_clock_was_set_back_is_killed(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, "run", "TRAINING", 10)
    gone = subprocess.Popen(["true"])
    gone.wait()
    later = time.time() + 3600
    write_json(run_dir.status.path, run_dir.status.read() | {"pid": gone.pid, "heartbeat": later})
    os.utime(run_dir.status.path, (later, later))
    assert summarise(run_dir.path).state == "KILLED"
