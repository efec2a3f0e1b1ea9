"""srun on a real Slurm with one node, made and ended by the test."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import train_losses
from test_launch import SETTINGS

DAEMONS = ("munged", "slurmctld", "slurmd")
REASON = "needs root and Slurm: apt-get install -y --no-install-recommends slurm-wlm munge"
pytestmark = pytest.mark.skipif(not all(map(shutil.which, DAEMONS)) or os.geteuid() != 0, reason=REASON)


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a submit host: munged, slurmctld and a slurmd of their own, without systemd and cgroups."""
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(mode=0o755)
    key, sock = folder / "munge/key", folder / "munge/socket"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    control, node = free_ports(2)
    host = socket.gethostname().partition(".")[0]
    config = folder / "slurm.conf"
    config.write_text(
        f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={sock}
SlurmctldPort={control}
SlurmdPort={node}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={node} CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=node1 Default=YES State=UP
"""
    )
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    env = os.environ | {"SLURM_CONF": str(config)}
    munge = [
        f"--socket={sock}",
        f"--key-file={key}",
        f"--pid-file={folder}/munge/pid",
        f"--seed-file={folder}/munge/seed",
    ]
    try:
        subprocess.run(["munged", "--force", *munge, f"--log-file={folder}/munge/log"], check=True, capture_output=True)
        subprocess.run(["slurmctld", "-f", str(config), "-c"], check=True, env=env)
        subprocess.run(["slurmd", "-f", str(config), "-N", "node1"], check=True, env=env)
        deadline = time.monotonic() + 20
        while "idle" not in subprocess.run(["sinfo", "-h", "-o", "%T"], env=env, capture_output=True, text=True).stdout:
            assert time.monotonic() < deadline, (folder / "slurmd.log").read_text()
            time.sleep(0.1)
        yield env
    finally:
        subprocess.run(["scancel", "--user", "root"], env=env, check=False, timeout=20)
        for name in ("slurmd.pid", "slurmctld.pid", "munge/pid"):
            if (folder / name).exists():
                os.kill(int((folder / name).read_text()), 15)


def test_srun_without_torchrun(slurm: dict[str, str], tmp_path: Path) -> None:
    """One task per rank: the same losses as one process, the job id names the run."""
    train = [sys.executable, "-m", "dist_train", "train", *SETTINGS, "-o", "train_for=20 steps", "-o", "dtype=float64"]
    done = subprocess.run(
        ["srun", "--ntasks=3", *train], cwd=tmp_path, env=slurm, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith("smoke-")
    result = json.loads((run_dir / "result.json").read_text())
    assert result["world_size"] == 3
    assert json.loads((run_dir / "run.json").read_text())["started_by"] == "srun"
    assert json.loads((run_dir / "status.json").read_text())["slurm_job_id"] == run_dir.name.removeprefix("smoke-")
    subprocess.run([*train, "--run-name", "alone"], cwd=tmp_path, check=True)
    assert train_losses(run_dir) == pytest.approx(train_losses(tmp_path / "runs/alone"), rel=1e-10)


def test_a_batch_shell_is_one_process(slurm: dict[str, str], tmp_path: Path) -> None:
    """SLURM_PROCID and SLURM_NTASKS are set in a batch shell too: they must not make half a world."""
    script = tmp_path / "job.sh"
    command = f"{sys.executable} -m dist_train train {' '.join(SETTINGS)} -o 'train_for=5 steps' --run-name batch"
    script.write_text(f"#!/bin/bash\n#SBATCH --ntasks=2\nset -eu\nenv | grep ^SLURM_PROCID\n{command}\n")
    subprocess.run(
        ["sbatch", "--wait", "--output=job.log", str(script)], cwd=tmp_path, env=slurm, check=True, timeout=120,
        capture_output=True,
    )  # fmt: skip
    log = (tmp_path / "job.log").read_text()
    assert "SLURM_PROCID=0" in log
    assert json.loads((tmp_path / "runs/batch/result.json").read_text())["world_size"] == 1, log
