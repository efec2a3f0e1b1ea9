"""The launch methods as a user runs them: real processes, the real MNIST."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from dist_train.cli import main
from dist_train.distributed.launcher_watch import is_alive
from dist_train.errors import LaunchError
from dist_train.launch.machines import Nodes
from dist_train.launch.subprocesses import output_of
from dist_train.runs.start_options import valid_run_name
from support.patience import wait_until
from support.processes import DIST_TRAIN, ROOT, alive, ranks_of, run, started
from support.ranks import run_forked
from support.run_files import assert_bit_identical, metrics, status, step_of, train_losses
from support.trainings import SETTINGS, release

LAUNCH_METHODS = {
    "python": [sys.executable, "-m", "dist_train", "train"],
    "dist-train launch": [*DIST_TRAIN, "launch", "--nproc", "2"],
    "torchrun": [str(ROOT / "launch/torchrun.sh")],
    "accelerate": [str(ROOT / "launch/accelerate.sh")],
    "accelerate, one process": ["accelerate-launch", "--cpu", "--num_processes=1", "-m", "dist_train", "train"],
}


def test_every_launch_method_gives_same_losses(tmp_path: Path) -> None:
    """20 steps in float64, where rounding cannot hide a difference."""
    for method, command in LAUNCH_METHODS.items():
        name = valid_run_name(method)
        done = run(
            [*command, *SETTINGS, "-o", "train_for=20 steps", "-o", "dtype=float64", "--run-name", name],
            tmp_path, NPROC="2",
        )  # fmt: skip
        assert done.returncode == 0, (name, done.stdout, done.stderr)
        result = json.loads((tmp_path / "runs" / name / "result.json").read_text())
        assert result["world_size"] == (1 if method in ("python", "accelerate, one process") else 2), name
        assert result["test/seen"] == 10_000
        assert train_losses(tmp_path / "runs" / name) == pytest.approx(
            train_losses(tmp_path / "runs/python"), rel=1e-10
        )


@pytest.mark.parametrize(
    ("command", "env"),
    [
        (["accelerate-launch", "--cpu", "--num_processes=2", "-m", "dist_train", "train"], {}),
        (["accelerate-launch", "--config_file", "multi_cpu.yaml", "-m", "dist_train", "train"], {}),
        ([*DIST_TRAIN, "train"], {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}),
    ],
    ids=["accelerate --cpu", "accelerate MULTI_CPU", "partial environment"],
)
def test_accidental_single_process_is_refused(command: list[str], env: dict[str, str], tmp_path: Path) -> None:
    lines = "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 2\n"
    (tmp_path / "multi_cpu.yaml").write_text(lines + "num_machines: 1\nmixed_precision: 'no'\n")
    done = run([*command, *SETTINGS], tmp_path, **env)
    assert done.returncode != 0
    assert "dist-train launch" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_resume_after_sigterm_in_mid_epoch(tmp_path: Path) -> None:
    """TERM at any step: state INTERRUPT, exit 0, and the resumed run equals an uninterrupted one."""
    command = [str(ROOT / "launch/local.sh"), "2", *SETTINGS, "-o", "train_for=200 steps"]
    command += ["model.name=support.user_nets:GatedBks", "-o", "data.name=support.user_sets:mnist_part"]
    stopped = tmp_path / "runs/stopped"
    with started([*command, "--run-name", "stopped"], tmp_path) as process:
        wait_until(lambda: step_of(stopped) >= 10, "the first steps")
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0, process.communicate()
    assert status(stopped) == "INTERRUPT"
    step = step_of(stopped)
    assert 10 <= step < 200
    assert alive(tmp_path) == []
    release(tmp_path)
    done = run([*command, "--run-name", "stopped"], tmp_path)
    assert done.returncode == 0, done.stderr
    uninterrupted = run_forked([*DIST_TRAIN, "train", *command[2:], "--run-name", "uninterrupted"], tmp_path, 2)
    assert uninterrupted.returncode == 0, uninterrupted.stderr
    assert_bit_identical(stopped, tmp_path / "runs/uninterrupted")
    assert {line["attempt"] for line in metrics(stopped)} == {1, 2}


@pytest.mark.parametrize("nproc", [[], ["--nproc", "2"]], ids=["1 process", "2 processes"])
def test_closed_terminal_is_stop_request(nproc: list[str], tmp_path: Path) -> None:
    """The run saves and ends cleanly although stdout and stderr are gone."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)

    def is_running() -> bool:
        with contextlib.suppress(BlockingIOError):  # drain it: a full terminal would block the run
            os.read(ours, 65536)
        return step_of(tmp_path / "runs/r") >= 20

    command = [*DIST_TRAIN, "train", "-c", "smoke", "-o", "log_every=1", "-o", "train_for=100 epochs", *nproc]
    with started(["setsid", "--ctty", *command, "--run-name", "r"], tmp_path, terminal=theirs) as process:
        os.close(theirs)
        wait_until(is_running, "the first steps")
        os.close(ours)
        assert process.wait() == 0
        assert alive(tmp_path) == []
    assert status(tmp_path / "runs/r") == "INTERRUPT"


def test_broken_pipe_does_not_stop_run(tmp_path: Path) -> None:
    """`dist-train train ... | head -n 1`, and nohup: neither a broken pipe nor HUP stops the run."""
    command = ["nohup", *DIST_TRAIN, "train", "-c", "smoke", "--nproc", "2", "-o", "eval_every=20", "--run-name", "r"]
    with started(command, tmp_path) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        wait_until(lambda: step_of(tmp_path / "runs/r") >= 20, "the first steps")
        process.send_signal(signal.SIGHUP)
        assert process.wait() == 0
    assert status(tmp_path / "runs/r") == "FINISHED"


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1], ids=lambda sent: sent.name)
def test_loader_workers_survive_signal_to_process_group(sent: signal.Signals, tmp_path: Path) -> None:
    """torchrun forwards TERM to process groups, and Slurm signals all processes of a job, including the workers."""
    options = ["-o", "data.name=support.user_sets:Jittered", "-o", "data.num_workers=2", "-o", "train_for=10000 epochs"]
    run_dir = tmp_path / "runs/r"
    command = [sys.executable, "-m", "dist_train", "train", *SETTINGS, *options, "--run-name", "r"]
    with started(
        [*command, "-o", "global_batch_size=8", "-o", "model.name=support.user_sets:WithDropout"], tmp_path
    ) as process:
        wait_until(lambda: step_of(run_dir) >= 20, "the first steps")
        assert len(alive(tmp_path)) == 3
        os.killpg(process.pid, sent)
        assert process.wait() == 0, process.communicate()
        wait_until(lambda: alive(tmp_path) == [], "workers gone")
    assert status(run_dir) == ("PREEMPTED" if sent == signal.SIGUSR1 else "INTERRUPT")


def test_stop_before_training_prints_one_line(tmp_path: Path) -> None:
    with started([*DIST_TRAIN, "train", *SETTINGS, "--nproc", "2", "--run-name", "r"], tmp_path) as process:
        wait_until(lambda: len(ranks_of(tmp_path)) > 0, "ranks started")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate()
        assert alive(tmp_path) == []
    assert process.returncode in (143, 0)  # 0: the ranks were fast enough to agree on it
    assert errors == ("stopped by SIGTERM before training began\n" if process.returncode else "")


@pytest.mark.parametrize("launcher", ["dist-train", "torchrun", "accelerate"])
def test_ranks_do_not_outlive_their_launcher(launcher: str, tmp_path: Path) -> None:
    """kill -9 of the launcher alone: every rank saves and ends too."""
    command = {
        "dist-train": [*DIST_TRAIN, "launch", "--nproc", "2"],
        "torchrun": [str(ROOT / "launch/torchrun.sh")],
        "accelerate": [str(ROOT / "launch/accelerate.sh")],
    }[launcher]
    run_dir = tmp_path / "runs/orphans"
    settings = [*SETTINGS, "-o", "train_for=100 epochs", "-o", "model.name=support.user_nets:LongOrphanGrace"]
    with started([*command, *settings, "--run-name", "orphans"], tmp_path, NPROC="2") as process:
        wait_until(lambda: step_of(run_dir) >= 20, "the first steps")
        process.kill()
        wait_until(lambda: ranks_of(tmp_path) == [], "ranks gone")
        wait_until(lambda: alive(tmp_path) == [], "torchrun gone too")
    assert status(run_dir) == "INTERRUPT"
    assert step_of(run_dir) >= 20


def test_zombie_counts_as_dead() -> None:
    """A killed launcher that nobody reaps must not keep its ranks alive."""
    process = subprocess.Popen(["sleep", "60"])
    assert is_alive(process.pid)
    process.kill()
    wait_until(lambda: not is_alive(process.pid), "seen as dead before it was waited for")
    process.wait()


def test_first_failing_rank_is_shown(tmp_path: Path) -> None:
    """One rank raises during training: all stop, with one message, and no process is left."""
    net = ["model.name=support.user_nets:Failing", "model.args.call=30", "model.args.rank=1"]
    done = run([*DIST_TRAIN, "launch", "--nproc", "2", *SETTINGS, "--run-name", "x", *net], tmp_path)
    assert done.returncode == 1
    assert re.search(r"Failing failed at step \d+: .*/user_nets\.py:\d+: ValueError: no such digit\.", done.stderr)
    assert "Traceback" not in done.stdout + done.stderr
    assert "[rank 1 on " in done.stderr
    assert "Connection closed" not in done.stderr
    assert alive(tmp_path) == []
    assert status(tmp_path / "runs/x") == "ERROR"
    assert json.loads((tmp_path / "runs/x/error.json").read_text())["rank"] == 1


def test_killed_rank_ends_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs/killed"
    command = [*DIST_TRAIN, "launch", "--nproc", "2", *SETTINGS, "-o", "train_for=100 epochs", "--run-name", "killed"]
    with started(command, tmp_path) as process:
        wait_until(lambda: step_of(run_dir) >= 20, "the first steps")
        ranks = ranks_of(tmp_path)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        _, errors = process.communicate()
    assert process.returncode == 1
    assert "Another rank is gone" in errors or "killed" in errors
    assert "Traceback" not in errors


def test_init_from_and_resume_never(tmp_path: Path) -> None:
    short = [*DIST_TRAIN, "train", *SETTINGS, "-o", "train_for=20 steps"]
    assert run_forked([*short, "--run-name", "first"], tmp_path).returncode == 0
    assert run_forked([*short, "--run-name", "second", "--init-from", "runs/first"], tmp_path).returncode == 0
    first, second = (train_losses(tmp_path / "runs" / name) for name in ("first", "second"))
    assert second[0] < first[-1] + 0.2 < first[0]
    never = run_forked([*short, "--run-name", "first", "--resume", "never"], tmp_path)
    assert never.returncode == 1
    assert "--run-name" in never.stderr
    other = run_forked([*short, "--run-name", "first", "-o", "optimizer.lr=0.5"], tmp_path)
    assert other.returncode == 2
    assert "optimizer.lr: 0.001 in the run, 0.5 now" in other.stderr
    again = run_forked([*DIST_TRAIN, "evaluate", "runs/first", "--json"], tmp_path)
    found = json.loads(again.stdout)
    assert found["seen"] == 10_000
    lines = metrics(tmp_path / "runs/first")
    assert found["accuracy"] == next(line["val/accuracy"] for line in lines if "val/accuracy" in line)


@pytest.mark.parametrize("host", ["nowhere.invalid", "a..b", "x" * 300, ""])
def test_unresolvable_rendezvous_endpoint_is_refused(host: str) -> None:
    with pytest.raises(LaunchError, match=rf'--rdzv-endpoint={host}:1: "{host}" cannot be resolved'):
        Nodes.parse("2", f"{host}:1", 60.0)


@pytest.mark.parametrize("command", [["launch", "--nproc=2"], ["train", "--nproc=2"]])
def test_pet_nnodes_from_environment_is_refused(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun would wait for them forever; if they were ignored, each would start a training of its own."""
    for name, value in {"PET_NNODES": "2", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "head"}.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(main, [*command, "-c", "smoke", "--dry-run"])
    assert result.exit_code == 2
    assert "PET_NNODES=2 from outside" in result.output
    assert "--nnodes=2 --rdzv-endpoint=head" in result.output
    if command[0] == "launch":
        assert CliRunner().invoke(main, [*command, "-c", "smoke", "--dry-run", "--nnodes=1"]).exit_code == 0


@pytest.mark.parametrize("script", ["torchrun.sh", "accelerate.sh"])
def test_single_machine_scripts_refuse_pet_nnodes(script: str, tmp_path: Path) -> None:
    for launcher in ("torchrun", "accelerate-launch"):
        (tmp_path / launcher).write_text("#!/bin/sh\necho started\n")
        (tmp_path / launcher).chmod(0o755)
    for machines in ("1", "1:1", "", "2", "1:2", "2:2", "11"):
        env = {"PET_NNODES": machines, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
        done = run([str(ROOT / "launch" / script), "-c", "smoke"], tmp_path, **env)
        if machines in ("1", "1:1", ""):
            assert (done.returncode, done.stdout, done.stderr) == (0, "started\n", "")
        else:
            assert (done.returncode, done.stdout) == (2, "")
            assert done.stderr.startswith(f"error: PET_NNODES={machines}: this is for one machine.")


def test_torchrun_gets_no_options_from_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PET_RDZV_ID", "x")
    (tmp_path / "show.py").write_text("import os\nprint([name for name in os.environ if name.startswith('PET_')])\n")
    assert output_of("show") == "[]\n"
