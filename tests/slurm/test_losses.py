"""Ranks, nodes, the controller or the shared folder fail: the run resumes from its last checkpoint."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from support.cluster import KILL_WAIT_S, LOST_S, Cluster
from support.jobs import (
    ONE_PER_NODE,
    Check,
    assert_finishes,
    full,
    is_training,
    log_of,
    pids_of_rank,
    steps_lost,
    submit,
    submit_long,
    trains_again,
)
from support.patience import wait_until
from support.run_files import status_of
from support.trainings import release, save

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]


def train(cluster: Cluster, folder: Path, *options: str, script: str = "train") -> tuple[str, Path]:
    """Start a job and return it when it trains and has saved a few steps ago."""
    job, run_dir = submit_long(cluster, folder, *options, script=script)
    wait_until(lambda: is_training(run_dir), "training")
    saved = save(run_dir)
    wait_until(lambda: is_training(run_dir, beyond=saved + 3), "steps to lose")
    return job, run_dir


def wait_for_next_attempt(cluster: Cluster, job: str, run_dir: Path) -> tuple[float, float, int]:
    """Return the seconds until Slurm notices, the seconds until the next attempt trains, and the steps lost."""
    reached, began = status_of(run_dir)["step"], time.monotonic()
    wait_until(lambda: cluster.state(job) != "RUNNING", "notice")
    noticed_s = time.monotonic() - began
    wait_until(partial(trains_again, cluster, job, run_dir, 2), "training again")
    return noticed_s, time.monotonic() - began, steps_lost(run_dir, reached)


def finish_undisturbed(cluster: Cluster, job: str, run_dir: Path, assert_undisturbed: Check, *attempts: int) -> None:
    release(run_dir.parent.parent)
    assert_finishes(cluster, job, run_dir, *attempts)
    assert_undisturbed(run_dir)


@pytest.mark.parametrize(("rank", "script"), [(0, "train"), full(3, "train"), full(2, "train_srun")])
def test_rank_killed(
    rank: int, script: str, cluster: Cluster, assert_undisturbed: Check, tmp_path: Path, row: Callable[..., None]
) -> None:
    job, run_dir = train(cluster, tmp_path, script=script)
    (pid,) = pids_of_rank(cluster, job, rank)
    os.kill(pid, signal.SIGKILL)
    noticed_s, again_s, lost = wait_for_next_attempt(cluster, job, run_dir)
    finish_undisturbed(cluster, job, run_dir, assert_undisturbed, 2)
    row(
        f"rank {rank} is killed (`{script}.sbatch`)", "requeued by the script",
        f"noticed {noticed_s:.0f}, trains {again_s:.0f}", lost, "weights and metrics to the bit",
    )  # fmt: skip


def test_node_crashes(cluster: Cluster, assert_undisturbed: Check, tmp_path: Path, row: Callable[..., None]) -> None:
    job, run_dir = train(cluster, tmp_path, script="train_srun")
    _first, second = cluster.nodes_of(job)
    with cluster.detecting_lost_nodes():
        cluster.crash(second)
        noticed_s, again_s, lost = wait_for_next_attempt(cluster, job, run_dir)
        assert second not in cluster.nodes_of(job)
        finish_undisturbed(cluster, job, run_dir, assert_undisturbed, 2)
    row(
        f"a node crashes (SlurmdTimeout={LOST_S})", "requeued by Slurm on another node",
        f"noticed {noticed_s:.0f}, trains {again_s:.0f}", lost, "weights and metrics to the bit",
    )  # fmt: skip


def test_node_disconnected_and_reconnected(
    cluster: Cluster, assert_undisturbed: Check, tmp_path: Path, row: Callable[..., None]
) -> None:
    """The node of rank zero, whose old process keeps running beside the new one and sees the same files."""
    job, run_dir = train(cluster, tmp_path, ONE_PER_NODE)
    first, _second = cluster.nodes_of(job)
    with cluster.detecting_lost_nodes():
        cluster.disconnect(first)
        noticed_s, again_s, lost = wait_for_next_attempt(cluster, job, run_dir)
        assert first not in cluster.nodes_of(job)
        assert len(pids_of_rank(cluster, job, 0)) == 2
        cluster.reconnect(first)
        gone_s = wait_until(lambda: len(pids_of_rank(cluster, job, 0)) < 2, "end of the old attempt")
        assert status_of(run_dir)["attempt"] == 2
        # Three if the old srun gets through again: it ends the new step, which has the same number.
        finish_undisturbed(cluster, job, run_dir, assert_undisturbed, 2, 3)
    row(
        f"the node of rank 0 loses its network (SlurmdTimeout={LOST_S}), "
        "and regains it while the run continues elsewhere",
        f"requeued by Slurm on another node; the old processes were gone {gone_s:.0f} s after the reconnection",
        f"noticed {noticed_s:.0f}, trains {again_s:.0f}", lost,
        "weights and metrics to the bit: the old attempt wrote nothing",
    )  # fmt: skip


def test_old_attempt_keeps_training(
    cluster: Cluster,
    assert_undisturbed: Check,
    tmp_path: Path,
    row: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All ranks are on the node that loses its network: they keep training and write where the new ones write."""
    monkeypatch.setitem(cluster.env, "NPROC", "3")
    job, run_dir = train(cluster, tmp_path, "--nodes=1", "--cpus-per-task=4")
    (node,) = cluster.nodes_of(job)
    with cluster.detecting_lost_nodes():
        cluster.disconnect(node)
        old = [pid for rank in range(3) for pid in pids_of_rank(cluster, job, rank)]
        for pid in old:  # otherwise it would finish before Slurm notices
            os.kill(pid, signal.SIGSTOP)
        noticed_s, again_s, lost = wait_for_next_attempt(cluster, job, run_dir)
        for pid in old:
            os.kill(pid, signal.SIGCONT)
        gone_s = wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in old), "end of the old")
        assert "attempt 1 was superseded by attempt 2" in log_of(run_dir)
        cluster.reconnect(node)
        finish_undisturbed(cluster, job, run_dir, assert_undisturbed, 2, 3)  # as above
    row(
        "the only node of a job loses its network, and its ranks keep training beside those of the requeued job",
        f"the old ranks notice that they are superseded and exit after {gone_s:.0f} s",
        f"noticed {noticed_s:.0f}, trains {again_s:.0f}", lost, "weights and metrics to the bit",
    )  # fmt: skip


def test_controller_down(cluster: Cluster, assert_undisturbed: Check, tmp_path: Path, row: Callable[..., None]) -> None:
    """The controller is down from before the job stops until after its first requeue request."""
    job, run_dir = train(cluster, tmp_path, script="train_srun")
    cluster.stop_controller()
    (run_dir / "STOP").write_text("PREEMPTED\n")
    began = time.monotonic()
    wait_until(lambda: "requeue, state PREEMPTED" in log_of(run_dir), "requeue request")
    time.sleep(3)
    cluster.start_controller()
    wait_until(lambda: cluster.state(job) == "PENDING", "requeue")
    wait_until(partial(trains_again, cluster, job, run_dir, 2), "training again")
    again_s = time.monotonic() - began
    finish_undisturbed(cluster, job, run_dir, assert_undisturbed, 2)
    row(
        "the controller is killed, and down while the job stops", "the script retries until the job is requeued",
        f"trains {again_s:.0f}", "0", "weights and metrics to the bit",
    )  # fmt: skip


def test_slow_shared_folder(
    cluster: Cluster,
    assert_undisturbed: Check,
    tmp_path: Path,
    row: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each fsync takes four seconds, so a save takes longer than a preemption allows: the run warns, and resumes."""
    slow = tmp_path / "python"
    tracing = "strace -DDD -f --seccomp-bpf -qq -o /dev/null -e trace=fsync -e inject=fsync:delay_exit=4000000"
    slow.write_text(f'#!/bin/sh\nexec {tracing} {sys.executable} "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setitem(cluster.env, "PYTHON", str(slow))
    job, run_dir = train(cluster, tmp_path, "--partition=low0", script="train_srun")
    wait_until(lambda: status_of(run_dir).get("save_s", 0) > KILL_WAIT_S, "slow save")
    warning = f"leaves a preempted job {KILL_WAIT_S} s"
    wait_until(lambda: warning in log_of(run_dir), "warning")
    submit(cluster, "--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 5")
    noticed_s, again_s, lost = wait_for_next_attempt(cluster, job, run_dir)
    finish_undisturbed(cluster, job, run_dir, assert_undisturbed, 2)
    row(
        f"the shared folder takes 4 s for each fsync, and a preemption leaves {KILL_WAIT_S} s",
        "warned that a save takes longer; killed during the save, requeued by Slurm",
        f"noticed {noticed_s:.0f}, trains {again_s:.0f}", lost, "weights and metrics to the bit",
    )  # fmt: skip
