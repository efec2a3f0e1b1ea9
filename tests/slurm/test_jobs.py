"""Trainings as jobs of a real Slurm: each script gives the same numbers as a run without Slurm."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_train.launch.resume import describe_new_start
from dist_train.runs.directory import RunDir
from support.cluster import Cluster
from support.jobs import SCRIPTS, ended, submit
from support.patience import wait_until
from support.run_files import metrics_without_times, status_of, train_losses
from support.trainings import SETTINGS, trained_once

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]

SHORT = [*SETTINGS, "-o", "train_for=20 steps"]
EXACT = [*SHORT, "-o", "dtype=float64"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An EXACT run on this machine, without Slurm."""
    return trained_once(tmp_path_factory, "one process", EXACT)


def test_srun_without_batch_script(
    cluster: Cluster, one_process: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tasks on one node and one on the other, which the totals do not show; the job id names the run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS")
    cluster.ask("srun", "--nodes=2", "--ntasks=3", sys.executable, "-m", "dist_train", "train", *EXACT)
    (run_dir,) = (tmp_path / "runs").iterdir()
    result = json.loads((run_dir / "result.json").read_text())
    assert result["world_size"] == 3
    facts = json.loads((run_dir / "run.json").read_text())
    assert facts["started_by"] == "srun"
    assert run_dir.name == f"smoke-{status_of(run_dir)['slurm_job_id']}"
    assert train_losses(run_dir) == pytest.approx(train_losses(one_process), rel=1e-10)


def test_batch_shell_is_one_process(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM_PROCID and SLURM_NTASKS are set in a batch shell too, and must not start an incomplete world."""
    monkeypatch.chdir(tmp_path)
    train = shlex.join([sys.executable, "-m", "dist_train", "train", *EXACT, "--run-name", "batch"])
    cluster.ask("sbatch", "--wait", "--ntasks=2", "--output=job.log", f"--wrap=env | grep ^SLURM_PROCID; {train}")
    log = (tmp_path / "job.log").read_text()
    assert "SLURM_PROCID=0" in log
    assert json.loads((tmp_path / "runs/batch/result.json").read_text())["world_size"] == 1, log


@pytest.mark.parametrize("script", ["train", "train_srun", "train_accelerate"])
def test_two_nodes_of_two_ranks_equal_one_process(
    script: str, cluster: Cluster, one_process: Path, tmp_path: Path, row: Callable[..., None]
) -> None:
    tasks = ["--ntasks-per-node=2", "--cpus-per-task=1"] if script == "train_srun" else []
    job = submit(cluster, f"--chdir={tmp_path}", *tasks, SCRIPTS / f"{script}.sbatch", *EXACT)
    run_dir = tmp_path / f"runs/smoke-{job}"
    wait_until(lambda: ended(cluster, job, run_dir), "end")
    result = json.loads((run_dir / "result.json").read_text())
    assert result["world_size"] == 4
    facts = json.loads((run_dir / "run.json").read_text())
    assert len(set(facts["hosts"])) == 2
    ours, alone = train_losses(run_dir), train_losses(one_process)
    assert len(ours) == 20
    assert ours == pytest.approx(alone, rel=1e-10)
    worst = max(abs(one - other) / other for one, other in zip(ours, alone, strict=True))
    row(f"`{script}.sbatch`, float64", "-", "-", "-", f"20 losses of one process within {worst:.0e}")


def test_submit_status_and_logs(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run is not submitted again, but under another name."""
    monkeypatch.chdir(tmp_path)
    ours = [sys.executable, "-m", "dist_train", "slurm"]
    output = cluster.ask(
        *ours, "submit", "--nodes=2", "--nproc=1", "--time=30", "--partition=low", "--run-name=mine", *EXACT
    )
    job = output.split()[1].rstrip(",")
    run_dir = tmp_path / "runs/mine"
    assert output == f"job {job}, run directory {run_dir}\n"
    wait_until(lambda: ended(cluster, job, run_dir), "end")
    table = cluster.ask(*ours, "status").splitlines()[1].split()
    assert table[:3] == ["mine", job, "COMPLETED"]
    assert "FINISHED" in table
    assert "ended, state FINISHED" in cluster.ask(*ours, "logs", "runs/mine")
    assert "finished already" in cluster.ask(*ours, "submit", "--run-name=mine", *EXACT)
    output = cluster.ask("sh", "-c", describe_new_start(RunDir(run_dir)))  # as the page shows it
    again = tmp_path / "runs/mine-2"
    wait_until(lambda: ended(cluster, output.split()[1].rstrip(","), again), "end")
    assert metrics_without_times(again) == metrics_without_times(run_dir)
    assert RunDir(again).read_submission()["options"] == RunDir(run_dir).read_submission()["options"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--partition=gold"], "--partition=gold does not exist. Use one of high, low, low0."),
        (["--nodes=4", "--nproc=1"], "--nodes=4, but partition low has 3. The job would wait forever: request less."),
        (
            ["--nproc=8"],
            "--nproc=8 x --cpus-per-proc=1 = 8 CPUs on a node, but no node of partition low has more than 4.",
        ),
        (["--gpus-per-node=2"], "sbatch: Invalid generic resource (gres) specification"),
    ],
)
def test_unavailable_resources_are_refused(
    options: list[str], message: str, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused = cluster.run(
        "head", sys.executable, "-m", "dist_train", "slurm", "submit", *SHORT, *options, env=cluster.env
    )
    assert refused.returncode in (1, 2)
    assert message in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_port_in_use_is_refused(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MASTER_PORT is left over in the shell that starts a job."""
    monkeypatch.chdir(tmp_path)
    # Killing the child would end only nsenter; the listener ends when its stdin is closed.
    listen = (
        "import socket, sys; taken = socket.create_server(('', 23456)); print('taken', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        cluster.command("node1", sys.executable, "-c", listen), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"taken\n"
        train = ["srun", "--nodes=2", "--ntasks=2", "--kill-on-bad-exit=1", sys.executable, "-m", "dist_train", "train"]
        done = cluster.run("head", *train, *SHORT, env=cluster.env | {"MASTER_PORT": "23456"})
    finally:
        other.communicate()
    assert done.returncode != 0
    assert "MASTER_PORT=23456 is in use on node1. Unset it, or set another for this job." in done.stderr
    assert "Traceback" not in done.stderr


def test_unshared_run_directory_is_refused(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each host has its own /dev/shm."""
    monkeypatch.setitem(cluster.env, "NPROC", "1")
    own = f"--export=ALL,DIST_TRAIN_RUNS_DIR=/dev/shm/{tmp_path.name}"
    job = submit(cluster, f"--chdir={tmp_path}", own, SCRIPTS / "train.sbatch", *SHORT)
    wait_until(lambda: cluster.state(job) == "FAILED", "end")
    log = (tmp_path / f"dist-train-{job}.out").read_text()
    assert "1 of 2 ranks do not see the run directory /dev/shm/" in log
    assert "Put runs_dir on a file system that all nodes share." in log


def test_job_log_holds_only_rank_zero_until_failure(cluster: Cluster, tmp_path: Path) -> None:
    """Only rank zero writes to the job's log, until a rank fails; the others' output goes to their own files."""
    settings = [
        "-c", "smoke", "train_for=9000 steps", "log_every=10", "eval_every=0", "tracking.wandb=disabled",
        "model.name=support.user_nets:Failing", "model.args.call=100", "model.args.rank=3", "model.args.slow_s=0.1",
    ]  # fmt: skip
    job = submit(cluster, f"--chdir={tmp_path}", "--nodelist=node1,node2", SCRIPTS / "train.sbatch", *settings)
    wait_until(lambda: cluster.state(job) == "FAILED", "end")
    log = (tmp_path / f"dist-train-{job}.out").read_text()
    lines = log[: log.index("1: error [rank 3]")].splitlines()
    assert any(re.match(r"0: step \d+/9000  epoch .*  loss .* samples/s$", line) for line in lines)
    assert all(line.startswith("0: ") for line in lines), log
    assert [line for line in lines if "hello" in line] == ["0: hello from rank 0"]
    assert "[rank 3 on node2]" in log.splitlines()[-1]
    assert "ValueError: no such digit" in log.splitlines()[-1]
    for rank in (1, 2, 3):
        own = (tmp_path / f"runs/smoke-{job}/logs/rank_{rank:05d}.log").read_text()
        assert f"hello from rank {rank}" in own


def test_jobs_on_shared_nodes_do_not_interfere(
    cluster: Cluster,
    count: Callable[..., int],
    tmp_path: Path,
    row: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Concurrent jobs on the same nodes; each trains its own run."""
    number = count(20, 6)
    options = [f"--chdir={tmp_path}", "--cpus-per-task=1", "--nodelist=node1,node2"]
    monkeypatch.setitem(cluster.env, "NPROC", "1")
    jobs = [submit(cluster, *options, SCRIPTS / "train.sbatch", *SHORT, f"seed={n}") for n in range(number)]
    began = {job: tmp_path / f"runs/smoke-{job}" for job in jobs}
    seconds = wait_until(lambda: all(ended(cluster, *each) for each in began.items()), "end of all", 2400)
    assert len({tuple(train_losses(run_dir)) for run_dir in began.values()}) == number
    assert {status_of(run_dir)["attempt"] for run_dir in began.values()} == {1}
    row(
        f"{number} concurrent jobs, four at a time on the same two nodes",
        "all finish",
        f"{seconds:.0f}",
        "0",
        f"{number} separate runs",
    )
