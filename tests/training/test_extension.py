"""A run that is trained longer ends as if it had been started with that length, whatever happens in between."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from dist_train.atomic_files import read_json
from dist_train.config.loading import load_config
from dist_train.runs.directory import RunDir
from support.once import made_once
from support.processes import DIST_TRAIN
from support.ranks import run_forked, run_on_ranks, train_here, train_on_ranks
from support.run_files import assert_bit_identical, contents, largest_difference, metrics, status, train_losses, weights

END, LONGER = 16, 22  # steps; an epoch has 8
SETTINGS: dict[str, Any] = {
    "data": {"name": "support.user_sets:Jittered"},
    "model": {"name": "support.user_sets:WithDropout"},
    "optimizer": {"name": "adamw", "lr": 1e-2, "weight_decay": 0.1},
    "schedule": {"name": "step", "milestones": ["5 steps", "19 steps"], "warmup": "2 steps"},
    "ema_decay": 0.9,
    "global_batch_size": 12,
    "train_for": "2 epochs",
    "log_every": 1,
    "eval_every": "4 steps",
    "final_train_eval": False,
}
EXTENDED = SETTINGS | {"train_for": f"{LONGER} steps"}


@pytest.fixture
def finished(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """A copy of a run that has trained two epochs."""
    made = made_once(tmp_path_factory, "to be extended", lambda folder: train_on_ranks(SETTINGS, folder / "r"))
    return Path(shutil.copytree(made / "r", tmp_path / "runs/r", symlinks=True))


@pytest.fixture
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was started with the longer length."""
    return made_once(tmp_path_factory, "of full length", lambda folder: train_on_ranks(EXTENDED, folder / "r")) / "r"


def refused(folder: Path, *options: str) -> str:
    done = run_forked([*DIST_TRAIN, "train", "-q", "--resume=r", *options], folder)
    assert done.returncode == 2, done.stderr
    return done.stderr


@pytest.mark.parametrize("stop_after", [None, END + 1, END + 3])
def test_extended_run_equals_one_of_that_length(stop_after: int | None, finished: Path, whole: Path) -> None:
    """Also stopped right after it went on: optimizer, order, averages and learning rate go on. Once it is extended,
    it is the run of its config.yaml, which any start continues."""
    train_on_ranks(EXTENDED, finished, stop_after=stop_after, extend=True)
    if stop_after is not None:
        assert status(finished) == "INTERRUPT"
        train_on_ranks(EXTENDED, finished)
    assert_bit_identical(finished, whole)
    result, other = (read_json(path / "result.json") for path in (finished, whole))
    assert {name: result[name] for name in other if "/" in name} == {name: other[name] for name in other if "/" in name}
    assert (result["step"], status(finished)) == (LONGER, "FINISHED")


def test_run_that_is_not_finished_is_extended(tmp_path: Path, whole: Path) -> None:
    train_on_ranks(SETTINGS, tmp_path / "r", stop_after=END - 1)
    train_on_ranks(EXTENDED, tmp_path / "r", extend=True)
    assert_bit_identical(tmp_path / "r", whole)


def test_extension_on_other_numbers_of_processes(tmp_path: Path) -> None:
    """In the middle of an epoch, which then closes with the examples of both parts."""
    exact = SETTINGS | {"dtype": "float64", "model": {"name": "mlp", "args": {"image_size": 8, "hidden": 16}}}
    longer = exact | {"train_for": "2 epochs"}
    train_on_ranks(longer, tmp_path / "whole")
    train_on_ranks(exact | {"train_for": "11 steps"}, tmp_path / "parts", world_size=2)
    train_on_ranks(longer | {"per_device_batch_size": 2}, tmp_path / "parts", world_size=3, extend=True)
    assert train_losses(tmp_path / "parts") == pytest.approx(train_losses(tmp_path / "whole"), rel=1e-10)
    assert largest_difference(weights(tmp_path / "parts"), weights(tmp_path / "whole")) < 1e-10
    audits = [line["audit/unique"] for line in metrics(tmp_path / "parts") if "audit/unique" in line]
    assert audits == [96, 36, 96]


def die_while_extending(run_dir: Path) -> None:
    RunDir.write_config = lambda self, config: os._exit(0)  # type: ignore[method-assign]
    train_here(EXTENDED, run_dir, extend=True)


@pytest.mark.parametrize("extend", [True, False])
def test_killed_while_it_is_extended(extend: bool, finished: Path, whole: Path, tmp_path: Path) -> None:
    """It is extended by the same command again, or stays as long as it was."""
    first = Path(shutil.copytree(finished, tmp_path / "first", symlinks=True))
    run_on_ranks(die_while_extending, finished, world_size=1)
    assert status(finished) == "STARTING"
    train_on_ranks(EXTENDED if extend else SETTINGS, finished, extend=extend)
    assert_bit_identical(finished, whole if extend else first)
    assert [each["step"] for each in RunDir(finished).read_provenance()["extensions"]] == [END]


def test_records_of_an_extension(finished: Path) -> None:
    """It may be given again, as a requeued job does; the time between is no time that was lost."""
    before = read_json(finished / "status.json")
    heartbeat = before["heartbeat"] - 1000
    (finished / "status.json").write_text((finished / "status.json").read_text().replace(
        f"{before['heartbeat']}", f"{heartbeat}"
    ))  # fmt: skip
    for _ in range(2):
        command = [*DIST_TRAIN, "train", "-q", "--resume=r", "--extend=18 steps"]
        assert run_forked(command, finished.parents[1]).returncode == 0
    (extension,) = RunDir(finished).read_provenance()["extensions"]
    assert (extension["step"], extension["settings"]) == (END, {"train_for": ["2 epochs", "18 steps"]})
    text = (finished / "config.yaml").read_text()
    assert text.splitlines()[0].endswith(f" at step {END}: train_for: 2 epochs -> 18 steps")
    assert str(load_config(str(finished / "config.yaml")).train_for) == "18 steps"
    after = read_json(finished / "status.json")
    assert (after["attempt"], after["wandb_id"], after["total_steps"]) == (2, before["wandb_id"], 18)
    assert after["seconds"]["down"] == pytest.approx(before["seconds"]["down"], abs=100)


def test_extension_that_cannot_be(finished: Path) -> None:
    folder = finished.parents[1]
    before = contents(folder)
    assert '--extend="3 epochs"' in refused(folder, "--extend=1 epochs")
    assert "Write the unit" in refused(folder, "--extend=5")
    assert "Add --resume=RUN" in refused(folder, "--extend=5 epochs", "--resume=auto", "-c", "smoke")
    assert "seed: 0 in the run, 1 now" in refused(folder, "--extend=5 epochs", "-o", "seed=1")
    assert "no run to extend" in refused(folder, "--extend=5 epochs", "--resume=auto", "-c", "smoke", "--run-name=new")
    assert "give --extend" in refused(folder, "-o", "train_for=5 epochs")
    assert contents(folder) == before


@pytest.mark.parametrize(
    "schedule",
    [{"name": "cosine"}, {"name": "one_cycle"}, {"name": "support.user_optimizers:halved"}],
    ids=["cosine", "one_cycle", "own"],
)
def test_schedule_that_depends_on_the_length(schedule: dict[str, Any], tmp_path: Path) -> None:
    """It is refused, with a fix that works as it is printed."""
    run_dir = tmp_path / "runs/r"
    train_on_ranks(SETTINGS | {"schedule": schedule, "train_for": "3 steps"}, run_dir)
    said = refused(tmp_path, "--extend=5 steps")
    assert f"schedule.name={schedule['name']} depends on the length" in said
    assert '-o "schedule={name: constant}" -o optimizer.lr=0.001,' in said
    fix = ["-o", "schedule={name: constant}", "-o", "optimizer.lr=0.001"]
    done = run_forked([*DIST_TRAIN, "train", "-q", "--resume=r", "--extend=5 steps", *fix], tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line["train/lr"] for line in metrics(run_dir) if "train/lr" in line][3:] == [0.001, 0.001]
    (extension,) = RunDir(run_dir).read_provenance()["extensions"]
    assert {"schedule.name", "optimizer.lr", "train_for"} <= extension["settings"].keys()


def test_own_schedule_without_a_length_goes_on(tmp_path: Path) -> None:
    settings = SETTINGS | {"schedule": {"name": "support.user_optimizers:falling"}}
    train_on_ranks(settings | {"train_for": "3 steps"}, tmp_path / "parts")
    for run_dir, extend in ((tmp_path / "parts", True), (tmp_path / "whole", False)):
        train_on_ranks(settings | {"train_for": "6 steps"}, run_dir, extend=extend)
    assert largest_difference(weights(tmp_path / "parts"), weights(tmp_path / "whole")) == 0


def test_early_stop_that_ended_the_run(tmp_path: Path) -> None:
    """It goes on with more patience as if it had always had that."""
    stopping = SETTINGS | {"early_stop": {"patience": 1, "min_delta": 0.9}, "train_for": "16 steps"}
    train_on_ranks(stopping, tmp_path / "runs/r")
    assert read_json(tmp_path / "runs/r/result.json")["early_stopped"]
    assert "-o early_stop=null" in refused(tmp_path, "--extend=20 steps")
    patient = stopping | {"early_stop": {"patience": 2, "min_delta": 0.9}}
    train_on_ranks(patient, tmp_path / "runs/r", extend=True)
    train_on_ranks(patient, tmp_path / "whole")
    assert read_json(tmp_path / "runs/r/result.json")["step"] == read_json(tmp_path / "whole/result.json")["step"] == 12
    assert largest_difference(weights(tmp_path / "runs/r"), weights(tmp_path / "whole")) == 0


def test_each_launcher_passes_it_on(finished: Path) -> None:
    """Each rank gets it, and a batch script, whose job may be requeued."""
    command = [*DIST_TRAIN, "slurm", "render", "--resume=r", "--extend=3 epochs"]
    done = run_forked(command, finished.parents[1])
    assert " train --resume=r '--extend=3 epochs' &" in done.stdout
    command = [*DIST_TRAIN, "train", "--resume=r", "--extend=3 epochs", "--nproc=2", "--dry-run"]
    done = run_forked(command, finished.parents[1])
    assert "'--extend=3 epochs'" in done.stdout.splitlines()[-1]
