"""Machines without a scheduler: one is powered off and comes back while the other trains; three start at once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_train.atomic_files import read_json
from support.hosts import REASON, Hosts, can_be_made
from support.patience import wait_until
from support.processes import DIST_TRAIN, ROOT
from support.ranks import run_forked
from support.run_files import train_losses
from support.trainings import SETTINGS, release

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(not can_be_made(), reason=REASON)]

EXACT = [*SETTINGS, "-o", "dtype=float64", "-o", "save_every=10 steps", "-o", "stall_timeout_s=30"]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with Hosts(tmp_path / "hosts", ["node1", "node2"]) as made:
        yield made


def test_host_powered_off_and_back(
    hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Callable[..., None]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"HEAD": "node1", "NPROC": "1", "PATH": path}
    held = ["model.name=support.user_nets:Gated", "model.args.slow_s=0.5", "train_for=400 steps"]
    train = [str(ROOT / "launch/restart.sh"), *EXACT, *held, "--run-name=r"]
    run_dir = tmp_path / "runs/r"

    def start(host: str) -> subprocess.Popen[bytes]:
        with (tmp_path / f"{host}.log").open("ab") as log:
            return subprocess.Popen(hosts.command(host, *train), env=env, stdout=log, stderr=log)

    def logs() -> str:
        return "\n".join(log.read_text() for log in sorted(tmp_path.glob("*.log")))

    def trains_on(world_size: int, beyond: int) -> bool:
        status = read_json(run_dir / "status.json")
        return (
            status.get("state") == "TRAINING"
            and status.get("world_size") == world_size
            and status.get("step", 0) > beyond
        )

    one, two = start("node1"), start("node2")
    wait_until(lambda: trains_on(2, beyond=15), "training on both")
    hosts.crash("node2")
    two.wait()
    crashed_at = read_json(run_dir / "status.json")["step"]
    off_s = wait_until(lambda: trains_on(1, beyond=crashed_at), "training on one")
    lost = crashed_at - read_json(run_dir / "status.json")["resumed_at"]
    hosts.reconnect("node2")
    hosts.boot("node2")
    reached = read_json(run_dir / "status.json")["step"]
    two = start("node2")
    back_s = wait_until(lambda: trains_on(2, beyond=crashed_at), "training on both again")
    assert read_json(run_dir / "status.json")["resumed_at"] >= reached, "steps were lost"
    release(tmp_path)
    assert (one.wait(), two.wait()) == (0, 0), logs()
    assert read_json(run_dir / "status.json")["state"] == "FINISHED"
    assert run_forked([*DIST_TRAIN, "train", *EXACT, *held, "--run-name=alone"], tmp_path).returncode == 0
    assert train_losses(run_dir) == pytest.approx(train_losses(tmp_path / "runs/alone"), rel=1e-8)
    exact = "float64 losses of one process within 1e-8, on 2, 1 and 2 hosts"
    off = "one of two hosts without Slurm is powered off (`launch/restart.sh`, stall_timeout_s=30)"
    row(off, "the other host continues alone", f"trains {off_s:.0f}", lost, exact)
    back = "the run saves and stops on request; both hosts restart it together"
    row("the host comes back", back, f"trains {back_s:.0f}", "0", exact)


@pytest.mark.full
def test_three_hosts_start_together_and_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may rendezvous at once, or stop and restart with a late one. No start removes the STOP file."""
    monkeypatch.chdir(tmp_path)
    names = ["node1", "node2", "node3"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"HEAD": "node1", "NODES": "1:3", "NPROC": "1", "PATH": path}
    held = ["model.name=support.user_nets:Gated", "model.args.slow_s=0.5", "train_for=400 steps"]
    train = [str(ROOT / "launch/restart.sh"), *SETTINGS, *held, "global_batch_size=96", "--run-name=r"]
    status = tmp_path / "runs/r/status.json"
    with Hosts(tmp_path / "hosts", names) as hosts:
        started = []
        for name in names:
            with (tmp_path / f"{name}.log").open("wb") as log:
                started.append(subprocess.Popen(hosts.command(name, *train), env=env, stdout=log, stderr=log))
        wait_until(
            lambda: read_json(status).get("world_size") == 3 and read_json(status).get("step"), "training on three"
        )
        (tmp_path / "runs/r/STOP").touch()
        codes = [process.wait() for process in started]
        logs = "\n".join(log.read_text() for log in sorted(tmp_path.glob("*.log")))
    assert (codes, read_json(status)["state"]) == ([0, 0, 0], "INTERRUPT"), logs
    assert read_json(status)["step"] < 400
