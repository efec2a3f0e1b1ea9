"""A real Slurm on hosts of network namespaces: munged, slurmctld on `head`, a slurmd on each node.

No systemd, no cgroups. Three partitions: `low`, whose jobs are preempted and requeued, `low0`, the same without a
grace time, and `high`. Accounting is off.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from support.hosts import Hosts
from support.hosts import can_be_made as hosts_can_be_made
from support.patience import wait_until

NEEDS = ("munged", "slurmctld", "slurmd", "strace")
REASON = "needs root and Slurm: apt-get install -y --no-install-recommends slurm-wlm munge iproute2 strace"
PORT = 27_000
GRACE_S, KILL_WAIT_S = 15, 15  # grace time of a preemption; time from TERM to KILL
# Until a silent node counts as down: in tests of lost nodes, and in all others, where it may only be busy.
LOST_S, PATIENT_S = 40, 600


def can_be_made() -> bool:
    return hosts_can_be_made() and all(map(shutil.which, NEEDS))


class Cluster(Hosts):
    """A cluster with idle nodes node1, node2, ...; use `with Cluster(folder, nodes=2) as cluster`."""

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 4) -> None:
        super().__init__(folder, ["head", *(f"node{number + 1}" for number in range(nodes))])
        self.nodes = self.names[1:]
        self.cpus = cpus
        self._lost_s = PATIENT_S
        self.env = {"SLURM_CONF": str(folder / "slurm.conf")}
        self.log = folder / "slurmctld.log"

    def __enter__(self) -> Cluster:
        for name in ("munge", "state", "spool"):
            (self.folder / name).mkdir(parents=True, mode=0o755)
        self.folder.chmod(0o755)
        super().__enter__()
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        super().__exit__()  # this kills every daemon and job on the hosts
        with suppress(OSError, ValueError):
            os.kill(int((self.folder / "munge/pid").read_text()), signal.SIGTERM)

    def _start(self) -> None:
        key = self.folder / "munge/key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        (self.folder / "slurm.conf").write_text(self._config())
        munge = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
        arguments = [f"--{name}={self.folder}/munge/{file}" for name, file in munge.items()]
        subprocess.run(["munged", "--force", *arguments], check=True, capture_output=True)
        self.start_controller()
        for node in self.nodes:
            self.start_node(node)
        wait_until(lambda: self._idle() == len(self.nodes), "idle nodes")

    def _config(self) -> str:
        folder, names = self.folder, ",".join(self.nodes)
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={node} NodeAddr={self.address(node)} CPUs={self.cpus} RealMemory=8000"
            for node in self.nodes
        )
        return f"""ClusterName=test
SlurmctldHost=head({self.address("head")})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
SlurmctldPort={PORT}
SlurmdPort={PORT + 1}
SrunPortRange={PORT + 100}-{PORT + 999}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={self.log}
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=100000,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PropagateResourceLimits=NONE
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait={KILL_WAIT_S}
MinJobAge=3600
SlurmdTimeout={self._lost_s}
MessageTimeout=20
BatchStartTimeout=60
InactiveLimit=0
{nodes}
PartitionName=low Nodes={names} Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={GRACE_S}
PartitionName=low0 Nodes={names} State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=high Nodes={names} State=UP PriorityTier=10 PreemptMode=OFF
"""

    # --- daemons --------------------------------------------------------------------------------------------------

    def start_controller(self) -> None:
        # Without -c, so that jobs survive a restart.
        self._daemon("head", "slurmctld", "-f", self.env["SLURM_CONF"])

    def stop_controller(self) -> None:
        """Kill the controller without a clean shutdown."""
        self.run("head", "bash", "-c", f"kill -KILL $(cat {self.folder}/slurmctld.pid)")

    @contextmanager
    def detecting_lost_nodes(self) -> Iterator[None]:
        """Count a node that is silent for LOST_S as down. On exit all nodes are idle."""
        self._configure(LOST_S)
        try:
            yield
        finally:
            self.repair()
            self._configure(PATIENT_S)

    def _configure(self, lost_s: int) -> None:
        self._lost_s = lost_s
        (self.folder / "slurm.conf").write_text(self._config())
        self.ask("scontrol", "reconfigure")

    def repair(self) -> None:
        """Reconnect and boot the nodes until all are idle."""
        self.ask("scancel", "--user=root")
        for node in self.nodes:
            self.reconnect(node)
            if node not in self._inits:
                self.boot(node)
                self.start_node(node)
        wait_until(lambda: self._idle() == len(self.nodes), "idle nodes")

    def start_node(self, node: str) -> None:
        (self.folder / "spool" / node).mkdir(exist_ok=True)
        self._daemon(node, "slurmd", "-f", self.env["SLURM_CONF"], "-N", node)

    def _daemon(self, host: str, *command: object) -> None:
        done = self.run(host, *command)
        assert done.returncode == 0, done.stderr

    # --- jobs -----------------------------------------------------------------------------------------------------

    def ask(self, *command: object, **options: Any) -> str:
        """Return the output of a command on the submit host."""
        done = self.run("head", *command, env=self.env, **options)
        assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def state(self, job: str) -> str:
        return self.ask("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip()

    def nodes_of(self, job: str) -> list[str]:
        names = self.ask("squeue", "--noheader", f"--jobs={job}", "--format=%N").strip()
        return self.ask("scontrol", "show", "hostnames", names).split()

    def start_at_once(self, job: str) -> None:
        """Start a requeued job now instead of after two minutes. A job that waits for others keeps waiting.

        First wait until five seconds after the end of its former start: Slurm may receive the end of the former batch
        shell after it has requeued the job, and takes it for the job's end if the job runs already.
        """
        if self.ask("squeue", "--noheader", f"--jobs={job}", "--format=%r").strip() != "BeginTime":
            return
        wait_until(lambda: not self._has_steps(job), f"end of job {job}'s former start")
        time.sleep(5)
        self.run("head", "scontrol", "update", f"jobid={job}", "StartTime=now", env=self.env)

    def _has_steps(self, job: str) -> bool:
        """Whether a slurmstepd of the job still runs on a reachable node."""
        number = self.ask("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%A").strip()
        nodes = [node for node in self.nodes if node in self._inits and node not in self._disconnected]
        return any(self.run(node, "pgrep", "-f", rf"^slurmstepd: \[{number}\.").returncode == 0 for node in nodes)

    def _idle(self) -> int:
        done = self.run("head", "sinfo", "--noheader", "-N", "-p", "low", "-o", "%T", env=self.env)
        return done.stdout.split().count("idle")
