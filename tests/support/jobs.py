"""Trainings as jobs of the cluster: submit them, watch them, disturb them, compare them."""

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
from support.trainings import SETTINGS, let_go

SCRIPTS = ROOT / "slurm"
# A job to be disturbed: held until it is let go, or for two minutes. It saves at its end and when it is asked to.
LONG = [
    *SETTINGS, "model.name=support.user_nets:Gated", "model.args.slow_s=1",
    "train_for=120 steps", "log_every=5", "save_every=120 steps",
]  # fmt: skip
Check = Callable[[Path], None]  # of a run directory
full = partial(pytest.param, marks=pytest.mark.full)  # parameters of a test with --full alone


def submit(cluster: Cluster, *command: object) -> str:
    return cluster.ask("sbatch", "--parsable", *command).strip()


def submit_long(cluster: Cluster, folder: Path, *options: str, script: str = "train") -> tuple[str, Path]:
    """The job and the run directory of a LONG training on two nodes, unless otherwise asked.

    On two ranks on each; by `train_srun`, which starts no torchrun and is sooner there, on two and on one.
    """
    if script == "train_srun":
        options = ("--ntasks=3", *options)
    job = submit(cluster, f"--chdir={folder}", *options, SCRIPTS / f"{script}.sbatch", *LONG)
    return job, folder / f"runs/smoke-{job}"


def is_training(run_dir: Path, beyond: int = 0) -> bool:
    """Beyond that step, and W&B has begun to record it."""
    status = status_of(run_dir)
    trains = status.get("state") == "TRAINING" and status.get("step", 0) > beyond
    return trains and len(segments(run_dir)) == status["attempt"]


def segments(run_dir: Path) -> list[str]:
    """The id of each of W&B's records."""
    return [path.name.rpartition("-")[2] for path in run_dir.glob("wandb/offline-run-*")]


def trains_again(cluster: Cluster, job: str, run_dir: Path, attempt: int, beyond: int = 0) -> bool:
    """Started at once whenever it waits: Slurm may set the time to wait for after it was taken back."""
    if cluster.state(job) == "PENDING":
        cluster.start_at_once(job)
    return status_of(run_dir).get("attempt") == attempt and is_training(run_dir, beyond)


def ended(cluster: Cluster, job: str, run_dir: Path) -> bool:
    """Started at once whenever it was queued again."""
    state = cluster.state(job)
    if state == "PENDING":
        cluster.start_at_once(job)
    assert state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "COMPLETED"), f"{run_dir}: job {job} is {state}"
    return state == "COMPLETED"


def end_well(cluster: Cluster, job: str, run_dir: Path, *attempts: int) -> None:
    """Wait for the end; the run is finished, as one W&B run, in so many attempts (or so many)."""
    wait_until(lambda: ended(cluster, job, run_dir), "end", 2400)
    status = status_of(run_dir)
    assert status["state"] == "FINISHED"
    assert status["attempt"] in attempts
    found = segments(run_dir)
    assert set(found) == {status["wandb_id"]}
    if len(attempts) == 1:  # each was disturbed when it was seen to train, and to be recorded
        assert len(found) == status["attempt"]
    assert len(found) <= status["attempt"]  # one that was ended in its set-up has none


def disturb_each(
    cluster: Cluster,
    folder: Path,
    times: int,
    disturb: Callable[[str], None],
    *options: str,
    script: str,
    state: str = "PREEMPTED",
) -> Path:
    """The directory of a LONG run that was disturbed while it was held, in each of so many attempts but the last."""
    job, run_dir = submit_long(cluster, folder, *options, script=script)
    beyond = 0
    for attempt in range(1, times + 1):
        wait_until(partial(trains_again, cluster, job, run_dir, attempt, beyond), "training")
        disturb(job)
        wait_until(lambda: status_of(run_dir)["state"] == state, "agreed stop")
        beyond = status_of(run_dir)["step"]
        assert status_of(run_dir)["attempt"] == attempt
        wait_until(lambda: cluster.state(job) == "PENDING", "requeue")
    let_go(folder)
    end_well(cluster, job, run_dir, times + 1)
    return run_dir


def steps_lost(run_dir: Path, reached: int) -> int:
    """Steps that the present attempt has to make again."""
    return max(0, reached - int(status_of(run_dir)["resumed_at"]))


def pids_of_rank(cluster: Cluster, job: str, rank: int) -> list[int]:
    """The living processes of this rank, on whatever node and of whatever attempt."""
    # Another cluster, that tests beside this one have made, has a job of the same number.
    wanted = {"SLURM_CONF": cluster.env["SLURM_CONF"], "SLURM_JOB_ID": job}
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (process / "cmdline").read_bytes()
            # Neither srun nor torchrun, whose commands have this in them.
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
