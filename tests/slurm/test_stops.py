"""Preemption and time limits: the run saves, is requeued, and ends like an uninterrupted one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from support.cluster import GRACE_S, KILL_WAIT_S, Cluster
from support.jobs import (
    LONG,
    ONE_PER_NODE,
    SCRIPTS,
    Check,
    assert_finishes,
    disturb_each,
    ended,
    full,
    is_training,
    log_of,
    pids_of_rank,
    submit,
    submit_long,
)
from support.patience import wait_until
from support.run_files import status_of
from support.trainings import release, save

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]


def preempt(cluster: Cluster, _job: str) -> None:
    """Submit a job of higher priority that takes all nodes."""
    options = ["--partition=high", f"--nodes={len(cluster.nodes)}", "--exclusive", "--output=/dev/null"]
    submit(cluster, *options, f"--wrap=sleep {GRACE_S}")


@pytest.mark.parametrize("script", ["train_srun", full("train")])
def test_preemption_with_grace_time(
    script: str,
    cluster: Cluster,
    assert_undisturbed: Check,
    tmp_path: Path,
    row: Callable[..., None],
    count: Callable[..., int],
) -> None:
    times = count(2)
    assert_undisturbed(disturb_each(cluster, tmp_path, times, partial(preempt, cluster), script=script))
    row(
        f"preempted, {times} x, GraceTime={GRACE_S} (`{script}.sbatch`)",
        "saved at the first TERM, PREEMPTED, requeued by the script", "-", "0",
        "weights and metrics to the bit; one W&B run",
    )  # fmt: skip


@pytest.mark.parametrize("script", ["train", full("train_srun")])
def test_preemption_without_grace_time(
    script: str,
    cluster: Cluster,
    assert_undisturbed: Check,
    tmp_path: Path,
    row: Callable[..., None],
    count: Callable[..., int],
) -> None:
    """Slurm itself requeues the job, and waits KillWait between TERM and KILL."""
    times, disturb = count(2), partial(preempt, cluster)
    run_dir = disturb_each(cluster, tmp_path, times, disturb, "--partition=low0", script=script, state="INTERRUPT")
    assert_undisturbed(run_dir)
    row(
        f"preempted, {times} x, GraceTime=0, KillWait={KILL_WAIT_S} (`{script}.sbatch`)",
        "saved at the TERM, requeued by Slurm", "-", "0", "weights and metrics to the bit; one W&B run",
    )  # fmt: skip


@pytest.mark.cluster(minutes=4)
def test_time_limit(
    cluster: Cluster, assert_undisturbed: Check, tmp_path: Path, row: Callable[..., None], count: Callable[..., int]
) -> None:
    """A real limit of two minutes. Slurm checks every 30 s, and signals half a minute earlier than requested.

    The run is slowed down so that no start finishes it within its time limit.
    """
    times = count(2)
    held = [*LONG, "model.args.slow_s=3"]
    job = submit(
        cluster, "--time=2", "--signal=B:USR1@1", ONE_PER_NODE, f"--chdir={tmp_path}", SCRIPTS / "train.sbatch", *held
    )
    run_dir = tmp_path / f"runs/smoke-{job}"
    for number in range(times):
        wait_until(partial(has_run_out, cluster, job, run_dir, number + 1), "end of its time", 2400)
    release(tmp_path)
    assert_finishes(cluster, job, run_dir, *range(times + 1, 20))  # more on a slower machine
    assert_undisturbed(run_dir)
    row(
        f"reached its time limit (2 minutes), at least {times} x",
        "saved at the advance signal, PREEMPTED, requeued by the script", "-", "0",
        "weights and metrics to the bit; one W&B run",
    )  # fmt: skip


def has_run_out(cluster: Cluster, job: str, run_dir: Path, times: int) -> bool:
    if cluster.state(job) == "PENDING":
        cluster.start_at_once(job)
    return log_of(run_dir).count("requeue, state PREEMPTED") >= times


def request_stop(cluster: Cluster, job: str) -> None:
    """Signal the batch shell, as at the time limit or as a user does who wants the nodes."""
    cluster.ask("scancel", "--batch", "--signal=USR1", job)


@pytest.mark.parametrize("disturb", [full(preempt), request_stop])
def test_stop_before_training(
    disturb: Callable[[Cluster, str], None], cluster: Cluster, assert_undisturbed: Check, tmp_path: Path
) -> None:
    """Nothing can be saved yet, and the job ends within its grace time: it must still be requeued."""
    job, run_dir = submit_long(cluster, tmp_path, ONE_PER_NODE)
    wait_until(lambda: pids_of_rank(cluster, job, 0), "start")
    disturb(cluster, job)
    wait_until(lambda: cluster.state(job) == "PENDING", "requeue")
    release(tmp_path)
    assert_finishes(cluster, job, run_dir, 1, 2)  # two if training began within the grace time
    assert_undisturbed(run_dir)


@pytest.mark.parametrize("script", ["train", full("train_srun"), full("train_accelerate")])
def test_cancelled_job_is_not_requeued(
    script: str, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cluster.env, "NPROC", "1")
    job, run_dir = submit_long(cluster, tmp_path, script=script)
    wait_until(lambda: is_training(run_dir), "training")
    cluster.ask("scancel", job)
    wait_until(lambda: cluster.state(job) == "CANCELLED", "end")
    assert status_of(run_dir)["state"] == "INTERRUPT", log_of(run_dir)
    assert status_of(run_dir)["step"] == int((run_dir / "checkpoints/last").resolve().name.removeprefix("step_"))


def test_stop_file(cluster: Cluster, assert_undisturbed: Check, tmp_path: Path, row: Callable[..., None]) -> None:
    """SAVE and STOP, from a shell that sees only the run directory. Submitted again, the run resumes."""
    job, run_dir = submit_long(cluster, tmp_path, script="train_srun")
    wait_until(lambda: is_training(run_dir), "training")
    save(run_dir)
    (run_dir / "STOP").touch()
    seconds = wait_until(lambda: ended(cluster, job, run_dir), "end")
    assert status_of(run_dir)["state"] == "INTERRUPT"
    release(tmp_path)
    same = [SCRIPTS / "train_srun.sbatch", *LONG, f"--run-name={run_dir.name}"]
    again = submit(cluster, f"--chdir={tmp_path}", "--ntasks=3", *same)
    assert_finishes(cluster, again, run_dir, 2)
    assert_undisturbed(run_dir)
    row("`touch STOP`", "saved, INTERRUPT, the job ends", f"{seconds:.0f}", "0", "resubmitted: to the bit")


def test_stop_request_for_pending_job(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The STOP file is older than any process of the run, and still applies."""
    monkeypatch.chdir(tmp_path)
    ours = [sys.executable, "-m", "dist_train", "slurm", "submit", "--launcher=srun", "--nproc=1", "--time=30"]
    job = cluster.ask(*ours, "--partition=low", "--sbatch=--hold", "--run-name=r", *LONG).split()[1].rstrip(",")
    run_dir = tmp_path / "runs/r"
    assert f"Job {job} of " in cluster.ask(sys.executable, "-m", "dist_train", "runs", "stop", "r")
    cluster.ask("scontrol", "release", job)
    wait_until(lambda: ended(cluster, job, run_dir), "end")
    assert (status_of(run_dir)["state"], status_of(run_dir)["step"]) == ("INTERRUPT", 1), log_of(run_dir)


def test_time_limit_of_array_member(
    cluster: Cluster, tmp_path: Path, row: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each member trains its own line. The one that runs out of time is requeued while the others train on."""
    monkeypatch.setitem(cluster.env, "NPROC", "1")
    (tmp_path / "lines").write_text("seed=1\nseed=2 optimizer.lr=2e-3\nseed=3\n")
    script = SCRIPTS / "sweep_array.sbatch"
    array = submit(cluster, f"--chdir={tmp_path}", "--array=1-3", script, "lines", *LONG)
    runs = {f"{array}_{member}": tmp_path / f"runs/smoke-{array}_{member}" for member in (1, 2, 3)}
    second = f"{array}_2"
    wait_until(lambda: is_training(runs[second]), "training")
    cluster.ask("scancel", "--batch", "--signal=USR1", second)
    wait_until(lambda: status_of(runs[second])["state"] == "PREEMPTED", "agreed stop")
    release(tmp_path)
    wait_until(lambda: all(ended(cluster, job, run) for job, run in runs.items()), "end of all", 2400)
    assert {job: status_of(run)["attempt"] for job, run in runs.items()} == {
        f"{array}_1": 1,
        second: 2,
        f"{array}_3": 1,
    }
    assert {status_of(run)["state"] for run in runs.values()} == {"FINISHED"}
    assert "lr: 0.002" in (runs[second] / "config.yaml").read_text()
    assert "seed: 3" in (runs[f"{array}_3"] / "config.yaml").read_text()
    row(
        "the time limit of one member of an array",
        "only that member is requeued",
        "-",
        "0",
        "three runs, each with its own settings",
    )
