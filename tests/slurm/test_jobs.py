"""Trainings as jobs of a real Slurm with two nodes: the same numbers, whatever Slurm does to them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ranks import train_losses
from test_launch import SETTINGS

from dist_train.run_dir import read_json
from slurm.cluster import GRACE_S, REASON, Cluster, can_be_made

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(not can_be_made(), reason=REASON)]

SCRIPTS = Path(__file__).parent.parent.parent / "slurm"
EXACT = [*SETTINGS, "-o", "train_for=20 steps", "-o", "dtype=float64"]
# Some 20 s on four ranks that share two cores; a save takes 0.1 s.
LONG = [*SETTINGS, "-o", "train_for=3000 steps", "-o", "log_every=100", "-o", "save_every=10 s"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as made:
        made.env |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        yield made


def status_of(run_dir: Path) -> dict[str, Any]:
    return read_json(run_dir / "status.json")


def submit(cluster: Cluster, *command: str) -> str:
    return cluster.ask("sbatch", "--parsable", *command).strip()


def is_training(run_dir: Path, beyond: int = 0) -> bool:
    status = status_of(run_dir)
    return status.get("state") == "TRAINING" and status.get("step", 0) > beyond


def trains_again(cluster: Cluster, job: str, run_dir: Path, beyond: int) -> bool:
    """Started at once whenever it waits: Slurm may set the time to wait for after it was taken back."""
    if cluster.state(job) == "PENDING":
        cluster.start_at_once(job)
    return is_training(run_dir, beyond)


def ended(cluster: Cluster, job: str, run_dir: Path) -> bool:
    """Started at once whenever it was queued again."""
    state = cluster.state(job)
    if state == "PENDING":
        cluster.start_at_once(job)
    assert state in ("PENDING", "RUNNING", "COMPLETING", "COMPLETED"), log_of(cluster, run_dir)
    return state == "COMPLETED"


def log_of(cluster: Cluster, run_dir: Path) -> str:
    logs = [*run_dir.parent.parent.glob("*.out"), *(run_dir / "logs").glob("*")]
    return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')}" for path in logs)


def test_srun_without_a_batch_script(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tasks on one node and one on the other, which cannot know it from the totals; the job id names the run."""
    monkeypatch.chdir(tmp_path)
    train = [sys.executable, "-m", "dist_train", "train", *EXACT]
    del cluster.env["OMP_NUM_THREADS"]
    try:
        cluster.ask("srun", "--nodes=2", "--ntasks=3", *train)
    finally:
        cluster.env["OMP_NUM_THREADS"] = "1"
    (run_dir,) = (tmp_path / "runs").iterdir()
    result = json.loads((run_dir / "result.json").read_text())
    assert result["world_size"] == 3
    facts = json.loads((run_dir / "run.json").read_text())
    assert facts["started_by"] == "srun"
    assert run_dir.name == f"smoke-{status_of(run_dir)['slurm_job_id']}"
    alone(tmp_path)
    assert train_losses(run_dir) == pytest.approx(train_losses(tmp_path / "runs/alone"), rel=1e-10)


def test_a_batch_shell_is_one_process(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM_PROCID and SLURM_NTASKS are set in a batch shell too: they must not make half a world."""
    monkeypatch.chdir(tmp_path)
    train = shlex.join([sys.executable, "-m", "dist_train", "train", *EXACT, "--run-name", "batch"])
    cluster.ask("sbatch", "--wait", "--ntasks=2", "--output=job.log", f"--wrap=env | grep ^SLURM_PROCID; {train}")
    log = (tmp_path / "job.log").read_text()
    assert "SLURM_PROCID=0" in log
    assert json.loads((tmp_path / "runs/batch/result.json").read_text())["world_size"] == 1, log


def alone(folder: Path) -> None:
    train = [sys.executable, "-m", "dist_train", "train", *EXACT, "--run-name", "alone"]
    subprocess.run(train, check=True, capture_output=True, env=os.environ, cwd=folder)


@pytest.mark.parametrize("script", ["train", "train_srun", "train_accelerate"])
def test_two_nodes_of_two_ranks_equal_one_process(
    script: str, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tasks = ["--ntasks-per-node=2", "--cpus-per-task=1"] if script == "train_srun" else []
    job = submit(cluster, *tasks, str(SCRIPTS / f"{script}.sbatch"), *EXACT)
    (run_dir,) = [tmp_path / f"runs/smoke-{job}"]
    cluster.wait_for(lambda: ended(cluster, job, run_dir), "end", 120)
    result = json.loads((run_dir / "result.json").read_text())
    assert result["world_size"] == 4
    facts = json.loads((run_dir / "run.json").read_text())
    assert sorted(set(facts["hosts"])) == ["node1", "node2"]
    alone(tmp_path)
    assert train_losses(run_dir) == pytest.approx(train_losses(tmp_path / "runs/alone"), rel=1e-10)


def disturbed(cluster: Cluster, tmp_path: Path, script: str, disturb: Any) -> Path:
    """A run that is disturbed as soon as it trains, twice."""
    job = submit(cluster, str(SCRIPTS / f"{script}.sbatch"), *LONG)
    run_dir = tmp_path / f"runs/smoke-{job}"
    beyond = 0
    for attempt in (1, 2):
        cluster.wait_for(partial(trains_again, cluster, job, run_dir, beyond), "training", 60)
        disturb(job)
        cluster.wait_for(lambda: status_of(run_dir)["state"] == "PREEMPTED", "agreed stop", 30)
        beyond = status_of(run_dir)["step"]
        assert status_of(run_dir)["attempt"] == attempt
        cluster.wait_for(lambda: cluster.state(job) == "PENDING", "requeue", 60)
    cluster.wait_for(lambda: ended(cluster, job, run_dir), "end", 120)
    assert status_of(run_dir)["state"] == "FINISHED"
    assert status_of(run_dir)["attempt"] == 3
    return run_dir


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    job = cluster.ask("sbatch", "--parsable", f"--chdir={folder}", str(SCRIPTS / "train.sbatch"), *LONG).strip()
    run_dir = folder / f"runs/smoke-{job}"
    cluster.wait_for(lambda: ended(cluster, job, run_dir), "end", 120)
    return run_dir


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    free = ("time", "attempt", "epoch_s")
    return [{k: v for k, v in line.items() if k not in free and not k.startswith("perf/")} for line in lines]


def same_run(one: Path, other: Path) -> None:
    weights = [sorted((path / "checkpoints").glob("step_*"))[-1] / "model.safetensors" for path in (one, other)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert metrics(one) == metrics(other)


def test_preempted_twice(cluster: Cluster, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a job of higher priority that takes both nodes."""
    monkeypatch.chdir(tmp_path)

    def preempt(_job: str) -> None:
        submit(cluster, "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", f"--wrap=sleep {GRACE_S}")

    same_run(disturbed(cluster, tmp_path, "train", preempt), undisturbed)


def test_the_time_limit_twice(
    cluster: Cluster, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal that announces it, sent by hand: Slurm itself needs a minute for the shortest limit."""
    monkeypatch.chdir(tmp_path)

    def warn(job: str) -> None:
        cluster.ask("scancel", "--batch", "--signal=USR1", job)

    same_run(disturbed(cluster, tmp_path, "train", warn), undisturbed)


def test_cancelled_is_not_queued_again(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = submit(cluster, str(SCRIPTS / "train_srun.sbatch"), *LONG)
    run_dir = tmp_path / f"runs/smoke-{job}"
    cluster.wait_for(lambda: is_training(run_dir), "training", 60)
    cluster.ask("scancel", job)
    cluster.wait_for(lambda: cluster.state(job) == "CANCELLED", "end", 60)
    assert status_of(run_dir)["state"] == "INTERRUPT", log_of(cluster, run_dir)


def test_by_our_own_commands(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """submit, status, logs; a finished run is not queued again."""
    monkeypatch.chdir(tmp_path)
    ours = [sys.executable, "-m", "dist_train", "slurm"]
    said = cluster.ask(*ours, "submit", "--nodes=2", "--time=30", "--partition=low", "--run-name=mine", *EXACT)
    job = said.split()[1].rstrip(",")
    run_dir = tmp_path / "runs/mine"
    assert said == f"job {job}, run directory {run_dir}\n"
    cluster.wait_for(lambda: ended(cluster, job, run_dir), "end", 60)
    row = cluster.ask(*ours, "status").splitlines()[1].split()
    assert row[:3] == ["mine", job, "COMPLETED"]
    assert "FINISHED" in row
    assert "ended, state FINISHED" in cluster.ask(*ours, "logs", "runs/mine")
    assert "finished already" in cluster.ask(*ours, "submit", "--run-name=mine", *EXACT)
    refused = cluster.run("head", *ours, "submit", "--partition=gold", *EXACT, env=cluster.env)
    assert refused.returncode == 2
    assert "--partition=gold does not exist. Use one of high, low." in refused.stderr
