"""The commands that the page shows: the same run anew or from its checkpoint, in any shell."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from dist_train.atomic_files import write_json
from dist_train.launch.resume import describe_command, describe_new_start
from dist_train.launch.slurm.batch_script import BatchScript
from dist_train.runs.directory import RunDir
from support.page import write_run
from support.processes import DIST_TRAIN, run
from support.ranks import run_forked
from support.run_files import metrics_without_times, train_losses
from support.trainings import SETTINGS

SHORT = [*SETTINGS, "train_for=4 steps"]


def test_new_start_gives_same_losses_in_any_shell(tmp_path: Path) -> None:
    """In another folder, with other threads, from the weights that the run began with."""
    for name, options in (("first", ()), ("run", ("--init-from=first", "-oseed=5"))):
        done = run_forked([*DIST_TRAIN, "train", *SHORT, *options, f"--run-name={name}"], tmp_path)
        assert done.returncode == 0, done.stderr
    (tmp_path / "elsewhere").mkdir()
    command = describe_new_start(RunDir(tmp_path / "runs/run"))
    done = run(["sh", "-c", str(command)], tmp_path / "elsewhere", OMP_NUM_THREADS="7")
    assert done.returncode == 0, done.stderr
    old, new = tmp_path / "runs/run", tmp_path / "runs/run-2"
    assert metrics_without_times(new) == metrics_without_times(old)
    assert train_losses(old) != train_losses(tmp_path / "runs/first")
    assert "--run-name run-3 " in str(describe_new_start(RunDir(old)))


def test_start_killed_in_set_up_is_resumed_as_it_was_begun(tmp_path: Path) -> None:
    run_forked([*DIST_TRAIN, "train", *SHORT, "--run-name=first"], tmp_path)
    net = "model.name=support.user_nets:KilledInSetUp"
    run_forked(
        [*DIST_TRAIN, "train", *SHORT, net, "--init-from=first", "--run-name=r"], tmp_path, 2, WANDB_MODE="offline"
    )
    run_dir = RunDir(tmp_path / "runs/r")
    assert run_dir.status.read()["state"] in ("STARTING", "SETUP")
    command = str(describe_command(run_dir))
    assert command.startswith(f"cd {tmp_path} && ")
    assert " WANDB_MODE=offline " in command
    first = f" --init-from {tmp_path}/runs/first"
    assert command.endswith(f" --resume {run_dir.path} --nproc 2{first}")
    assert f" --run-name r-2{first}" in str(describe_new_start(run_dir))


def test_new_start_of_job_is_submission_with_its_options(tmp_path: Path) -> None:
    options = BatchScript(
        nodes=2, nproc=3, time="1-0", partition="a b", options=("--qos=x", "--mem=9"), setup=("module load x",)
    ).submit_options()
    run_dir = write_run(tmp_path, "job")
    write_json(run_dir.slurm_json, {"job": "7", "cwd": "/somewhere else", "options": options})
    run_dir.write_provenance({"mixed_precision": "bf16", "num_nodes": 2, "num_threads": 3})
    assert shlex.split(str(describe_new_start(run_dir)))[5:] == [
        "-m", "dist_train", "slurm", "submit", "--nodes=2", "--nproc=3", "--time=1-0", "--partition=a b",
        "--sbatch=--qos=x", "--sbatch=--mem=9", "--setup=module load x", "-c", str(run_dir.config), "--run-name",
        "job-2", "-o", "mixed_precision=bf16",
    ]  # fmt: skip
    assert str(describe_new_start(run_dir)).startswith("cd '/somewhere else' && OMP_NUM_THREADS=3 ")


def test_new_start_of_several_machines(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, "lr=0.1 x")
    run_dir.write_provenance({"num_nodes": 2, "hosts": ["a", "b"]})
    command = str(describe_new_start(run_dir))
    assert " launch --nnodes=2 --rdzv-endpoint=a --nproc 1 -c " in command
    assert " --run-name lr=0.1_x-2" in command


@pytest.mark.parametrize("provenance", [{}, {"num_nodes": 0}, {"num_nodes": 3, "hosts": []}])
def test_new_start_of_incomplete_records(provenance: dict[str, object], tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, "r")
    write_json(run_dir.run_json, provenance)
    assert "--run-name r-2" in str(describe_new_start(run_dir))
    run_dir.config.unlink()
    assert describe_new_start(run_dir) is None
