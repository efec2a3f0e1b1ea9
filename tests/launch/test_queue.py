"""The queue: each job is begun once, in order, as many at a time as allowed, whatever is killed meanwhile."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner

from dist_train.cli import main
from dist_train.config.loading import load_config, parse_config
from dist_train.distributed.process_info import ASKED_AT
from dist_train.errors import ConfigError, RunDirError
from dist_train.launch import gpus
from dist_train.launch.job_queue import create_job, enqueue, ensure_keeper, places, take_back, waiting_jobs
from dist_train.launch.jobs import delete_run, request_stop
from dist_train.launch.keeper import begin, jobs_at_work, keep
from dist_train.launch.resume import resume
from dist_train.runs import deleted_runs, kernel_lock
from dist_train.runs.attempt import begin_attempt
from dist_train.runs.directory import RunDir
from dist_train.runs.start_lock import hold_start_lock, note_start
from dist_train.runs.summary import summarise
from support.page import SAME_ORIGIN, client_of, write_run
from support.patience import wait_until
from support.processes import alive, command_of
from support.queue_jobs import new_job, queued, trace


@pytest.fixture(autouse=True)
def _no_process_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keepers and launchers run in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    yield
    while begun_in(tmp_path):  # a keeper may begin another job meanwhile
        kill_all_begun_in(tmp_path)


def state(run_dir: RunDir) -> str:
    return summarise(run_dir.path).state


def keeper_lock(runs: Path) -> Path:
    return runs / f".queue.{socket.gethostname()}.lock"


def keep_here(runs: Path) -> None:
    """Be the keeper until no job waits."""
    lock = kernel_lock.acquire(keeper_lock(runs))
    assert lock is not None
    keep(runs, lock, print)
    os.close(lock)


def begun_in(folder: Path) -> list[int]:
    return [pid for pid in alive(folder) if pid != os.getpid()]


def kill_all_begun_in(folder: Path) -> None:
    for pid in begun_in(folder):
        with suppress(ProcessLookupError):  # it has ended by itself
            os.kill(pid, signal.SIGKILL)


def keepers(folder: Path) -> list[int]:
    return [pid for pid in alive(folder) if "queue work" in command_of(pid)]


# --- jobs ------------------------------------------------------------------------------------------------------------


def test_job_is_its_settings_and_where_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_API_KEY", "SECRET")
    config = parse_config({"seed": 7, "global_batch_size": 12})
    run_dir = RunDir(tmp_path / "runs" / "a")
    create_job(run_dir, config, nproc=2)
    assert load_config(str(run_dir.config)) == config
    job = run_dir.read_job()
    assert (job["nproc"], job["cwd"], job["python"]) == (2, str(tmp_path), sys.executable)
    assert job["environment"]["WANDB_PROJECT"] == "mine"
    assert "SECRET" not in run_dir.job_json.read_text()
    assert state(run_dir) == "CREATED"
    before = run_dir.config.read_bytes()
    with pytest.raises(RunDirError, match="exists already"):
        create_job(run_dir, parse_config({"seed": 8, "global_batch_size": 12}), nproc=1)
    assert run_dir.config.read_bytes() == before


def test_job_that_cannot_train_leaves_no_folder(tmp_path: Path) -> None:
    config = parse_config({"global_batch_size": 10})
    with pytest.raises(ConfigError, match="not a multiple of world_size=3"):
        create_job(RunDir(tmp_path / "runs" / "a"), config, nproc=3)
    with pytest.raises(ConfigError, match="a run name starts with"):
        create_job(RunDir(tmp_path / "runs" / "-a"), config, nproc=1)
    assert not (tmp_path / "runs").exists()


def test_places_follow_the_numbers_of_each_host(tmp_path: Path) -> None:
    a, b, c = queued(tmp_path, "c", "a", "b")
    assert [job.name for job in waiting_jobs(tmp_path / "runs")] == ["c", "a", "b"]
    b.write_job(b.read_job() | {"host": "elsewhere"})
    assert places(waiting_jobs(tmp_path / "runs")) == {"c": 1, "a": 1, "b": 2}
    take_back(a.path)
    assert (state(a), state(c)) == ("CREATED", "QUEUED")
    enqueue(a.path)
    assert places(waiting_jobs(tmp_path / "runs")) == {"a": 1, "b": 1, "c": 2}
    for refused in (enqueue, resume, request_stop):
        with pytest.raises(RunDirError, match=r"QUEUED|queue rm"):
            refused(a.path)
    take_back(a.path)
    with pytest.raises(RunDirError, match="only a job that is QUEUED"):
        take_back(a.path)
    with pytest.raises(RunDirError, match="only a job that is CREATED"):
        enqueue(write_run(tmp_path / "runs", "run").path)


def test_deleted_job_does_not_return_to_the_queue(tmp_path: Path) -> None:
    [job] = queued(tmp_path, "a")
    delete_run(job.path)
    [deleted] = deleted_runs.find_deleted(tmp_path / "runs")
    deleted_runs.restore(tmp_path / "runs", deleted.path.name)
    assert state(job) == "CREATED"


# --- the keeper ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1, 2])
def test_jobs_begin_in_order_and_so_many_at_a_time(jobs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["d", "b", "a", "c"]
    made = queued(tmp_path, *names)
    ensure_keeper(tmp_path / "runs", jobs)
    for done, name in enumerate(names):
        begun = {f"begin {each}" for each in names[: done + jobs]}
        wait_until(lambda: begun <= {*trace(tmp_path)}, "begin")  # noqa: B023
        assert begun == {line for line in trace(tmp_path) if line.startswith("begin")}
        at_work = min(jobs, len(names) - done)
        wait_until(lambda: len(jobs_at_work(tmp_path / "runs")) <= at_work, "end of the job before")  # noqa: B023
        assert len(jobs_at_work(tmp_path / "runs")) == at_work
        assert state(made[done]) == "STARTING"
        (tmp_path / f"go.{name}").touch()
        wait_until(lambda: f"end {name}" in trace(tmp_path), "end")  # noqa: B023
    times = [job.read_job()["begun"] for job in made]
    assert times == sorted(times)
    wait_until(lambda: not keepers(tmp_path), "end of the keeper")
    cores = len(os.sched_getaffinity(0))
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // jobs)))
    assert f"OMP_NUM_THREADS={threads}" in (tmp_path / "env.a").read_text().splitlines()
    assert {state(job) for job in made} == {"KILLED"}  # no status was written


def test_threads_are_divided_unless_they_are_set(tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    first, second = queued(tmp_path, "a", "b", environment={})
    second.write_job(second.read_job() | {"environment": {"OMP_NUM_THREADS": "9"}, "nproc": 2})
    (tmp_path / "runs" / f".queue.{socket.gethostname()}.json").write_text('{"jobs": 2}')
    keep_here(tmp_path / "runs")
    cores = len(os.sched_getaffinity(0))
    assert first.read_job()["environment"]["OMP_NUM_THREADS"] == str(max(1, cores // 2))
    assert second.read_job()["environment"]["OMP_NUM_THREADS"] == "9"


def test_folder_interpreter_and_variables_are_those_of_the_shell_that_queued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two shells; the keeper has variables of its own, which no job gets."""
    (tmp_path / "go").touch()
    for shell in ("one", "two"):
        (tmp_path / shell).mkdir()
        monkeypatch.chdir(tmp_path / shell)
        monkeypatch.setenv("WANDB_PROJECT", shell)
        monkeypatch.setenv("DIST_TRAIN_DATA_DIR", f"/data/{shell}")
        queued(tmp_path, shell)
        monkeypatch.delenv("WANDB_PROJECT")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_RUN_ID", "of another run")
    monkeypatch.setenv("MINE", "kept")
    with monkeypatch.context() as elsewhere:
        elsewhere.chdir(tmp_path)
        keep_here(tmp_path / "runs")
    for shell in ("one", "two"):
        wait_until(lambda: f"end {shell}" in trace(tmp_path), "end")  # noqa: B023
        assert (tmp_path / f"cwd.{shell}").read_text().strip() == str(tmp_path / shell)
        env = (tmp_path / f"env.{shell}").read_text().splitlines()
        assert {f"WANDB_PROJECT={shell}", f"DIST_TRAIN_DATA_DIR=/data/{shell}", "MINE=kept"} <= set(env)
        assert "WANDB_MODE=disabled" in env  # as when it was queued
        assert not any(line.startswith("WANDB_RUN_ID") for line in env)


def test_job_that_cannot_begin_does_not_block_others(tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    gone, nowhere, last = queued(tmp_path, "gone", "nowhere", "last")
    gone.write_job(gone.read_job() | {"python": "/gone/python"})
    nowhere.write_job(nowhere.read_job() | {"cwd": "/nowhere"})
    keep_here(tmp_path / "runs")
    wait_until(lambda: trace(tmp_path) == ["begin last", "end last"], "end")
    client, _ = client_of(tmp_path / "runs", tmp_path)
    for run_dir, why in ((gone, "/gone/python: No such file"), (nowhere, "/nowhere, which does not exist")):
        assert state(run_dir) == "KILLED"
        assert why in client.get(f"/jobs/{run_dir.path.name}").text
    assert state(last) == "KILLED"


def test_job_is_begun_once_by_two_that_try(tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    [job] = queued(tmp_path, "a")
    assert begin(job, {"environment": {}})
    wait_until(lambda: trace(tmp_path) == ["begin a", "end a"], "end")
    assert not begin(job, {"environment": {}})
    [other] = queued(tmp_path, "b")
    with hold_start_lock(other):
        note_start(other)  # by another process
        with pytest.raises(RunDirError, match="started already"):
            begin(other, {"environment": {}})
    assert state(other) == "QUEUED"
    assert trace(tmp_path) == ["begin a", "end a"]


def test_stop_of_a_starting_job_is_not_taken_for_an_old_one(tmp_path: Path) -> None:
    """A STOP file from before a start is removed by it; this one was written before any Python of the start ran."""
    [job] = queued(tmp_path, "a")
    assert begin(job, {"environment": {}})
    assert "after its first step" in request_stop(job.path)
    wait_until(lambda: trace(tmp_path) == ["begin a"], "begin")
    [asked_at] = [line for line in (tmp_path / "env.a").read_text().splitlines() if line.startswith(f"{ASKED_AT}=")]
    begin_attempt(job, load_config(str(job.config)), "id", asked_at=float(asked_at.partition("=")[2]))
    assert job.stop_request_file.exists()


def test_job_that_was_started_in_a_shell_is_not_begun(tmp_path: Path) -> None:
    [job] = queued(tmp_path, "a")
    job.status.begin({"attempt": 1}, job.status.time_accounting)
    job.status.update(state="INTERRUPT")
    keep_here(tmp_path / "runs")
    assert (state(job), trace(tmp_path)) == ("INTERRUPT", [])


def test_only_one_keeper_and_none_when_nothing_waits(tmp_path: Path) -> None:
    queued(tmp_path, "a", "b")
    for _ in range(3):
        ensure_keeper(tmp_path / "runs")
    wait_until(lambda: trace(tmp_path) == ["begin a"], "begin")
    assert len(keepers(tmp_path)) == 1
    (tmp_path / "go").touch()
    wait_until(lambda: not keepers(tmp_path), "end of the keeper")
    assert not kernel_lock.is_held(keeper_lock(tmp_path / "runs"))
    log = (tmp_path / "runs" / f".queue.{socket.gethostname()}.log").read_text()
    assert [line.split()[2:] for line in log.splitlines()] == [["a:", "begun"], ["b:", "begun"]]


def test_killed_keeper_is_replaced_by_the_next_look_and_begins_nothing_twice(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    one, two = queued(tmp_path, "a", "b")
    client, _ = client_of(runs, tmp_path)
    client.get("/")
    wait_until(lambda: trace(tmp_path) == ["begin a"], "begin")
    [first] = keepers(tmp_path)
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: not keepers(tmp_path), "end of the keeper")
    assert (state(one), state(two)) == ("STARTING", "QUEUED")  # its launcher goes on
    client.get("/rows")
    wait_until(lambda: keepers(tmp_path), "the next keeper")
    assert trace(tmp_path) == ["begin a"]
    (tmp_path / "go").touch()
    wait_until(lambda: not keepers(tmp_path), "end of the keeper")
    wait_until(lambda: "end b" in trace(tmp_path), "end")
    assert trace(tmp_path) == ["begin a", "end a", "begin b", "end b"]


def test_all_processes_end_at_once_as_when_the_machine_restarts(tmp_path: Path) -> None:
    one, two, three = queued(tmp_path, "a", "b", "c")
    ensure_keeper(tmp_path / "runs")
    wait_until(lambda: trace(tmp_path) == ["begin a"], "begin")
    kill_all_begun_in(tmp_path)
    wait_until(lambda: not begun_in(tmp_path), "end of all")
    assert [state(job) for job in (one, two, three)] == ["KILLED", "QUEUED", "QUEUED"]
    (tmp_path / "go").touch()
    assert CliRunner().invoke(main, ["queue", "ls", "--in", str(tmp_path / "runs")]).exit_code == 0
    wait_until(lambda: trace(tmp_path)[-1] == "end c", "end")
    assert trace(tmp_path) == ["begin a", "begin b", "end b", "begin c", "end c"]
    resume(one.path)  # the first was killed before its first status: it goes on
    wait_until(lambda: trace(tmp_path)[-1] == "end a", "end")


def test_jobs_of_another_host_are_left_to_it(tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    theirs, _ = queued(tmp_path, "theirs", "ours")
    theirs.write_job(theirs.read_job() | {"host": "elsewhere"})
    with hold_start_lock(new_job(tmp_path / "runs", "at_work", host="elsewhere", begun=1.0)):
        keep_here(tmp_path / "runs")  # a job at work there does not keep ours waiting
    wait_until(lambda: trace(tmp_path) == ["begin ours", "end ours"], "end")
    assert state(theirs) == "QUEUED"


# --- GPUs ------------------------------------------------------------------------------------------------------------


def fake_gpus(folder: Path, monkeypatch: pytest.MonkeyPatch, count: int, busy: str = "") -> None:
    """Put an nvidia-smi of `count` GPUs on the path; `busy` computes on one of them for somebody else."""
    program = folder / "nvidia-smi"
    every = "\n".join(f"GPU-{number}" for number in range(count))
    program.write_text(f'#!/bin/sh\ncase "$1" in *compute-apps*) echo "{busy}";; *) echo "{every}";; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")  # which hides the GPUs of this machine from all tests


def test_gpus_are_given_as_many_as_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(tmp_path, monkeypatch, 5, busy="GPU-1")
    a, b, c = queued(tmp_path, "a", "b", "c", settings={"device": "auto", "global_batch_size": 12}, nproc=2)
    ensure_keeper(tmp_path / "runs")
    wait_until(lambda: len(trace(tmp_path)) == 2, "begin")  # four are free: two jobs of two
    assert [job.read_job().get("gpus") for job in (a, b, c)] == [["GPU-0", "GPU-2"], ["GPU-3", "GPU-4"], None]
    assert "CUDA_VISIBLE_DEVICES=GPU-3,GPU-4" in (tmp_path / "env.b").read_text().splitlines()
    (tmp_path / "go.a").touch()
    wait_until(lambda: "begin c" in trace(tmp_path), "begin")
    assert c.read_job()["gpus"] == ["GPU-0", "GPU-2"]
    (tmp_path / "go").touch()


def test_visible_gpus_by_index_and_uuid() -> None:
    every = ["GPU-aa", "GPU-bb", "GPU-cc"]
    assert gpus.visible(every, None) == every
    assert gpus.visible(every, "2,GPU-a") == ["GPU-cc", "GPU-aa"]
    assert gpus.visible(every, "") == []
    assert gpus.visible(every, "7") == []


def test_job_for_more_gpus_than_there_are_is_begun_and_may_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpus(tmp_path, monkeypatch, 1)
    (tmp_path / "go").touch()
    [job] = queued(tmp_path, "a", settings={"device": "cuda", "global_batch_size": 12}, nproc=2)
    keep_here(tmp_path / "runs")
    assert job.read_job()["gpus"] == ["GPU-0"]


# --- locks -----------------------------------------------------------------------------------------------------------


def test_lock_without_support_of_the_file_system_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import fcntl
    import tempfile

    flock, shared = fcntl.flock, tmp_path / "shared"
    (tmp_path / "tmp").mkdir()
    shared.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))

    def unsupported(descriptor: int, operation: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().is_relative_to(shared):
            raise OSError(errno.ENOLCK, "No locks available")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", unsupported)
    lock = kernel_lock.acquire(shared / "a")
    assert lock is not None
    assert kernel_lock.is_held(shared / "a")
    assert kernel_lock.acquire(shared / "a") is None
    assert not kernel_lock.is_held(shared / "b")
    assert kernel_lock.acquire(shared / "b") is not None  # another file, another lock
    os.close(lock)
    assert not kernel_lock.is_held(shared / "a")


# --- the page and the command line -----------------------------------------------------------------------------------


def test_page_runs_and_takes_back(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    queued(tmp_path, "first")
    job = new_job(runs, "mine", python=str(tmp_path / "python"))
    client, _ = client_of(runs, tmp_path)
    assert ">Run</button>" in client.get("/jobs/mine").text
    assert client.post("/jobs/mine/run", headers=SAME_ORIGIN).status_code == 303
    wait_until(lambda: trace(tmp_path) == ["begin first"], "begin")
    text = client.get("/jobs/mine").text
    assert f"place 1 on {socket.gethostname()}" in text
    assert "Take back" in text
    assert client.post("/jobs/mine/run", headers=SAME_ORIGIN).status_code == 409
    rows = {row["run"]: row for row in client.get("/rows", headers={"accept": "application/json"}).json()}
    assert (rows["mine"]["state"], rows["mine"]["place"], rows["first"]["state"]) == ("QUEUED", 1, "STARTING")
    assert "STARTING. Stop it first" in client.post("/jobs/first/delete", headers=SAME_ORIGIN).text
    assert client.post("/jobs/mine/take_back", headers=SAME_ORIGIN).status_code == 303
    assert (state(job), ">Run</button>" in client.get("/jobs/mine").text) == ("CREATED", True)
    assert client.post("/jobs/first/stop", headers=SAME_ORIGIN).status_code == 303
    assert (runs / "first" / "STOP").exists()
    client.post("/jobs/mine/run", headers=SAME_ORIGIN)
    assert client.post("/jobs/mine/delete", headers=SAME_ORIGIN).status_code == 303
    assert client.get("/jobs/mine").status_code == 404
    (tmp_path / "go").touch()


def test_commands_queue_list_and_remove(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def command(*arguments: str) -> str:
        done = CliRunner().invoke(main, ["queue", *arguments])
        return f"{done.exit_code} {done.output}"

    queued(tmp_path, "first")
    command("ls")  # begins the keeper
    wait_until(lambda: trace(tmp_path) == ["begin first"], "begin")
    said = command("add", "-c", "smoke", "--run-name=second", "--nproc=2", "train_for=3 steps", "-oseed=5")
    assert said.startswith("0 ")
    assert "waits in the queue: dist-train queue ls shows it." in said
    config = load_config(str(tmp_path / "runs/second/config.yaml"))
    assert (config.seed, RunDir(tmp_path / "runs/second").read_job()["nproc"]) == (5, 2)
    assert [line.split()[:3] for line in command("ls").splitlines()[1:]] == [
        ["-", "first", "STARTING"], ["1", "second", "QUEUED"],
    ]  # fmt: skip
    assert "QUEUED 1" in CliRunner().invoke(main, ["runs", "ls"]).output
    assert "place 1 on" in CliRunner().invoke(main, ["runs", "show", "second"]).output
    assert command("rm", "second") == "0 "
    assert "queue add" in CliRunner().invoke(main, ["runs", "show", "second"]).output
    assert state(RunDir(tmp_path / "runs/second")) == "CREATED"
    assert command("add", "second").startswith("0 ")
    assert command("rm", "second") == "0 "
    for wrong, why in {
        ("add", "-c", "smoke"): "needs a name",
        ("add", "--nproc=2"): "name its config",
        ("add",): "nothing to queue",
        ("add", "first"): "is STARTING",
        ("rm", "second"): "is CREATED",
    }.items():
        said = command(*wrong)
        assert (said[0] != "0", why in said) == (True, True), said
    monkeypatch.setenv("DIST_TRAIN_RUNS_DIR", "elsewhere")
    assert f"queue ls --in {tmp_path}/runs shows it" in command("add", f"{tmp_path}/runs/second")
    assert command("rm", f"{tmp_path}/runs/second") == "0 "
    (tmp_path / "go").touch()
