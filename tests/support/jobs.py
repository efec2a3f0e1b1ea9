"""Trainings as cluster jobs: helpers to submit, watch and disturb them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from support.cluster import Cluster
from support.patience import wait_until
from support.processes import ROOT
from support.run_files import status_of
from support.trainings import SETTINGS, release

SCRIPTS = ROOT / "slurm"
# A job to be disturbed: held until released, or for two minutes. It saves at its end and on request.
LONG = [
    *SETTINGS, "model.name=support.user_nets:Gated", "model.args.slow_s=1",
    "train_for=120 steps", "log_every=5", "save_every=120 steps",
]  # fmt: skip
# The fewest processes of a torchrun job on two nodes, where the order in which their gradients are added is not tested.
ONE_PER_NODE = "--export=ALL,NPROC=1"
Check = Callable[[Path], None]  # of a run directory
full = partial(pytest.param, marks=pytest.mark.full)  # parameters for runs with --full only


def submit(cluster: Cluster, *command: object) -> str:
    return cluster.ask("sbatch", "--parsable", *command).strip()


def submit_long(cluster: Cluster, folder: Path, *options: str, script: str = "train") -> tuple[str, Path]:
    """Submit a LONG training on two nodes, unless `options` differ; return the job and the run directory.

    Each node runs two ranks; `train_srun`, which starts faster without torchrun, runs two and one.
    """
    if script == "train_srun":
        options = ("--ntasks=3", *options)
    job = submit(cluster, f"--chdir={folder}", *options, SCRIPTS / f"{script}.sbatch", *LONG)
    return job, folder / f"runs/smoke-{job}"


def is_training(run_dir: Path, beyond: int = 0) -> bool:
    """Whether the run trains beyond that step and W&B records it."""
    status = status_of(run_dir)
    trains = status.get("state") == "TRAINING" and status.get("step", 0) > beyond
    return trains and len(segments(run_dir)) == status["attempt"]


def segments(run_dir: Path) -> list[str]:
    """Return the run id of each W&B record."""
    return [path.name.rpartition("-")[2] for path in run_dir.glob("wandb/offline-run-*")]


def trains_again(cluster: Cluster, job: str, run_dir: Path, attempt: int, beyond: int = 0) -> bool:
    """Whether the attempt trains; start a pending job at once each time, as Slurm may set its delay late."""
    if cluster.state(job) == "PENDING":
        cluster.start_at_once(job)
    return status_of(run_dir).get("attempt") == attempt and is_training(run_dir, beyond)


def ended(cluster: Cluster, job: str, run_dir: Path) -> bool:
    """Whether the job has completed; start a requeued job at once."""
    state = cluster.state(job)
    if state == "PENDING":
        cluster.start_at_once(job)
    assert state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "COMPLETED"), f"{run_dir}: job {job} is {state}"
    return state == "COMPLETED"


def assert_finishes(cluster: Cluster, job: str, run_dir: Path, *attempts: int) -> None:
    """Wait for the end and assert that the run finished as one W&B run in one of these numbers of attempts."""
    wait_until(lambda: ended(cluster, job, run_dir), "end", 2400)
    status = status_of(run_dir)
    assert status["state"] == "FINISHED"
    assert status["attempt"] in attempts
    found = segments(run_dir)
    assert set(found) == {status["wandb_id"]}
    if len(attempts) == 1:  # each was disturbed while it trained and was recorded
        assert len(found) == status["attempt"]
    assert len(found) <= status["attempt"]  # an attempt that ended during set-up has none


def disturb_each(
    cluster: Cluster,
    folder: Path,
    times: int,
    disturb: Callable[[str], None],
    *options: str,
    script: str,
    state: str = "PREEMPTED",
) -> Path:
    """Disturb a LONG run in each of its first `times` attempts while it is held; return its directory."""
    job, run_dir = submit_long(cluster, folder, *options, script=script)
    beyond = 0
    for attempt in range(1, times + 1):
        wait_until(partial(trains_again, cluster, job, run_dir, attempt, beyond), "training")
        disturb(job)
        wait_until(lambda: status_of(run_dir)["state"] == state, "agreed stop")
        beyond = status_of(run_dir)["step"]
        assert status_of(run_dir)["attempt"] == attempt
        wait_until(lambda: cluster.state(job) == "PENDING", "requeue")
    release(folder)
    assert_finishes(cluster, job, run_dir, times + 1)
    return run_dir


def steps_lost(run_dir: Path, reached: int) -> int:
    """Return the number of steps that the current attempt repeats."""
    return max(0, reached - int(status_of(run_dir)["resumed_at"]))


def pids_of_rank(cluster: Cluster, job: str, rank: int) -> list[int]:
    """Return the live processes of a rank, on any node and of any attempt."""
    # The cluster of a concurrent test may have a job with the same number.
    wanted = {"SLURM_CONF": cluster.env["SLURM_CONF"], "SLURM_JOB_ID": job}
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (process / "cmdline").read_bytes()
            # Skip srun and torchrun, whose command lines contain it too.
            if b"/python" not in command.split(b"\0")[0] or b"torch.distributed.run" in command:
                continue
            entries = (process / "environ").read_text(errors="replace").split("\0")
            environment = dict(entry.partition("=")[::2] for entry in entries)
            number = environment.get("RANK", environment.get("SLURM_PROCID"))
            if wanted.items() <= environment.items() and number == str(rank) and b"\0dist_train\0train\0" in command:
                found.append(int(process.name))
    return found


def log_of(run_dir: Path) -> str:
    logs = [*run_dir.parent.parent.glob("*.out"), *(run_dir / "logs").glob("*")]
    return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')}" for path in logs)
