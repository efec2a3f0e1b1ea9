"""A grid of runs without W&B: missing runs are trained, finished runs are left untouched."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from dist_train.cli import main
from dist_train.config.loading import load_config
from dist_train.errors import ConfigError
from dist_train.launch.subprocesses import begin_train
from dist_train.launch.sweep import Grid, Sweep
from support.patience import wait_until
from support.processes import DIST_TRAIN, ROOT, alive, run, started
from support.trainings import release
from support.wandb_server import WandbServer

SETTINGS = shlex.split("-c smoke -o log_every=10 -o eval_every=0 -o final_train_eval=false -o 'train_for=400 steps'")
HELD = ["model.name=support.user_nets:Gated", "model.args.slow_s=0.01"]
GRID = ["optimizer.lr=[1e-3, 3e-3]", "seed=[0,1]"]
COMMAND = [*DIST_TRAIN, "sweep", *SETTINGS, *HELD, *GRID, "--name", "s"]


def test_lists_form_a_grid() -> None:
    grid = Grid.of("s", "smoke", ["train_for=20 steps", *GRID])
    assert grid.common == ("train_for=20 steps",)
    assert [point.name for point in grid.points[:3]] == ["s-lr=1e-3-seed=0", "s-lr=1e-3-seed=1", "s-lr=3e-3-seed=0"]
    assert grid.lines()[-1] == "optimizer.lr=3e-3 seed=1"
    assert len(grid.points) == 4


@pytest.mark.parametrize(
    ("override", "items"),
    [
        ("optimizer.betas=[0.9, 0.99]", []),  # the setting is a list
        ("optimizer.betas=[[0.9, 0.99], [0.8, 0.9]]", ["optimizer.betas=[0.9, 0.99]", "optimizer.betas=[0.8, 0.9]"]),
        ("tracking.tags=[a, b]", []),
        ("model.name=[mlp, conv]", ["model.name=mlp", "model.name=conv"]),
        ("model.args.hidden=[1]", ["model.args.hidden=1"]),
        ("train_for=[2 epochs, '30 steps']", ["train_for=2 epochs", "train_for='30 steps'"]),
        ("model.args={hidden: 1}", []),
    ],
)
def test_lists_are_axes_unless_setting_is_a_list(override: str, items: list[str]) -> None:
    grid = Grid.of("s", "smoke", [override, "seed=[7]"])
    assert [point.settings for point in grid.points] == [
        (*([item] if item else []), "seed=7") for item in items or [""]
    ]
    assert grid.common == (() if items else (override,))


def test_dependent_lists_are_not_axes() -> None:
    """Neither mean nor std is valid without the other."""
    normalize = ["data.normalize.mean=[0.5]", "data.normalize.std=[0.5]"]
    assert Grid.of("s", "smoke", [*normalize, "seed=[7]"]).common == tuple(normalize)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=1"], "Nothing to sweep over"),
        (["optimizer.lr=[1e-3, fast]"], r"optimizer.lr=fast: .*optimizer\.lr"),
        (["optimizer.name=[sgd]", "optimizer.betas=[[0.9, 0.99]]"], "betas"),
        (["seeds=[0, 1]"], "seeds"),
        (["seed=[0, 1, 0]"], "seed=0: another combination has the name s-seed=0"),
    ],
)
def test_nothing_starts_if_combination_is_invalid(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Grid.of("s", "smoke", overrides)


def test_lines_for_job_array() -> None:
    result = CliRunner().invoke(main, ["sweep", "-c", "smoke", *GRID, "--lines"])
    assert result.output.splitlines()[0] == "optimizer.lr=1e-3 seed=0"
    refused = CliRunner().invoke(main, ["sweep", "-c", "smoke", "train_for=[2 epochs, 3 epochs]", "--lines"])
    assert refused.exit_code == 2
    assert "a space ends a value" in refused.output


def states(folder: Path) -> dict[str, str]:
    found = {}
    for path in folder.glob("runs/*/status.json"):
        found[path.parent.name] = json.loads(path.read_text())["state"]
    return found


def results(folder: Path) -> dict[str, tuple[int, int, float]]:
    """Return the finish time, attempt and test accuracy of each finished run."""
    return {
        path.parent.name: (path.stat().st_mtime_ns, found["attempt"], found["test/accuracy"])
        for path in folder.glob("runs/*/result.json")
        if (found := json.loads(path.read_text()))
    }


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_sweep_resumes_with_missing_runs(sent: signal.Signals, tmp_path: Path) -> None:
    """The sweep is stopped when one or two of four runs are finished and the next one trains."""
    with started([*COMMAND, "--jobs", "2"], tmp_path) as process:
        wait_until(lambda: len(results(tmp_path)) >= 1 and "TRAINING" in states(tmp_path).values(), "a run")
        os.kill(process.pid, sent)
        out, _err = process.communicate()
        wait_until(lambda: not alive(tmp_path), "end of its runs")  # they do not outlive it
    release(tmp_path)
    before = results(tmp_path)
    assert 1 <= len(before) < 4
    if sent == signal.SIGTERM:
        assert process.returncode == 0
        assert "The same command continues the others" in out
        assert "TRAINING" not in states(tmp_path).values()
    again = run(COMMAND, tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "4 of 4 runs are finished." in again.stdout
    assert "±" in again.stdout  # of the seeds
    assert "choosing by the test split; data.val_examples=5000 holds out others" in again.stdout
    after = results(tmp_path)
    assert len(after) == 4
    assert {name: after[name] for name in before} == before
    assert {attempt for _, attempt, _ in after.values()} <= {1, 2}
    for name, (_, _, accuracy) in after.items():
        assert f"{accuracy:.2%}" in next(line for line in again.stdout.splitlines() if line.startswith(f"{name} "))
    if sent == signal.SIGTERM:
        done = run(COMMAND, tmp_path)
        assert "begins" not in done.stdout
        assert results(tmp_path) == after
        other = run([*COMMAND, "optimizer.weight_decay=0.1"], tmp_path)  # the existing runs have other settings
        assert other.returncode == 2
        assert "optimizer.weight_decay" in other.stderr
        assert "--name" in other.stderr


def test_failed_run_stops_no_other(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "from torch import nn\nclass Net(nn.Sequential):\n    def __init__(self, size):\n"
        "        assert size > 0\n        super().__init__(nn.Flatten(), nn.Linear(784, 10))\n"
    )
    command = [*DIST_TRAIN, "sweep", *SETTINGS, "train_for=5 steps", "model.name=nets:Net", "model.args.size=[0, 1]"]
    done = run(command, tmp_path)
    assert done.returncode == 1
    assert "1 of 2 runs are finished." in done.stdout
    assert "smoke-sweep-size=0: " in done.stdout
    assert "AssertionError" in done.stdout


def test_runs_do_not_inherit_outer_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "outer")
    monkeypatch.setenv("WANDB_NAME", "outer")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))  # stands in for the training
    (tmp_path / "python").write_text('#!/bin/bash\necho "${WANDB_RUN_ID-unset} ${WANDB_NAME-unset} $WANDB_RUN_GROUP"\n')
    (tmp_path / "python").chmod(0o755)
    assert begin_train([], tmp_path / "log", 1, "s").wait() == 0
    assert (tmp_path / "log").read_text() == "unset unset s\n"


@pytest.mark.parametrize("name", ["a b", "../x", "-x"])
def test_invalid_sweep_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--name="):
        Sweep(Grid.of(name, "smoke", ["seed=[0]"]), tmp_path, jobs=1, nproc=None)


def test_wandb_agent(tmp_path: Path) -> None:
    """The real agent takes its orders from a fake server; it chooses the arguments and names itself."""
    config = (ROOT / "configs/sweep.yaml").read_text()
    short = config.replace("mnist_mlp,", 'smoke, "log_every=10", "final_train_eval=false", "train_for=40 steps",')
    assert short != config
    points = [{"optimizer.lr": 0.001, "seed": 0}, {"optimizer.lr": 0.01, "seed": 1}]
    with WandbServer(sweep=short, points=points) as server:
        agent = [sys.executable, "-m", "wandb", "agent", "--count", "2", "somebody/dist_train/s"]
        done = run(agent, tmp_path, **server.env)
        assert done.returncode == 0, done.stdout + done.stderr
        assert server.runs == {"of-sweep-0", "of-sweep-1"}
        for number, point in enumerate(points):
            name = f"of-sweep-{number}"
            recorded = json.loads(server.buckets[name]["config"])
            path = tmp_path / f"runs/smoke-{name}"
            settings = load_config(str(path / "config.yaml"))
            assert (settings.optimizer.lr, settings.seed) == (point["optimizer.lr"], point["seed"])
            assert recorded["optimizer.lr"]["value"] == point["optimizer.lr"]
            assert (server.buckets[name]["sweep"], server.buckets[name]["groupName"]) == ("s", "s")
            assert {row["step"] for row in server.histories[name]} == {10, 20, 30, 40}
            assert json.loads((path / "status.json").read_text())["state"] == "FINISHED"
