"""The directory and the name of a run, and what a start that failed early leaves."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest
from click.testing import CliRunner

from dist_train.atomic_files import read_json, write_json
from dist_train.cli import main
from dist_train.config.loading import parse_config
from dist_train.config.schema import Config
from dist_train.errors import ConfigError, LaunchError
from dist_train.launch import jobs
from dist_train.launch.torchrun import LaunchSpec
from dist_train.runs import start_options as module
from dist_train.runs.directory import RunDir
from dist_train.runs.start_options import (
    StartOptions,
    check_run_name,
    find_run_dir,
    remove_if_not_started,
    valid_run_name,
)
from support.processes import DIST_TRAIN
from support.ranks import run_forked
from support.trainings import SETTINGS


class Noon(datetime):
    @classmethod
    def now(cls, tz: object = None) -> Noon:
        return cls(2026, 11, 26, 12)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setattr(module, "datetime", Noon)
    return parse_config({"runs_dir": str(tmp_path / "runs")})


def test_starts_within_one_second_get_separate_folders(config: Config, tmp_path: Path) -> None:
    paths = [find_run_dir(config, StartOptions("mnist"), claim=True).path for _ in range(4)]
    assert [path.name for path in paths] == [
        "mnist-20261126-120000", "mnist-20261126-120000-2", "mnist-20261126-120000-3", "mnist-20261126-120000-4",
    ]  # fmt: skip
    assert all(path.is_dir() for path in paths)


def test_finding_directory_creates_nothing(config: Config, tmp_path: Path) -> None:
    assert find_run_dir(config, StartOptions("mnist")).path.name == "mnist-20261126-120000"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("job", [None, "7"])
def test_named_run_is_found_again(job: str | None, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    start = StartOptions("mnist", run_name=None if job else "first")
    for _ in range(2):
        run_dir = find_run_dir(config, start, claim=True)
        run_dir.create()
        assert run_dir.path.name == ("mnist-7" if job else "first")


# --- names -------------------------------------------------------------------------------------------------------

GOOD = ["first", "s-lr=1e-3-seed=0", "3", "a.b+c,d_e", "n\u00fcll"]
BAD = ["", "a b", "-x", ".x", "a/b", "..", "a\nb", "a\0b", "my config (2)", "$(x)", "x " * 300, "a" * 250,
       "a" + "\u00fc" * 150]  # fmt: skip


@pytest.mark.parametrize("name", [*GOOD, *BAD])
def test_run_names(name: str, tmp_path: Path) -> None:
    if name in GOOD:
        check_run_name("--run-name", name, tmp_path)
        assert valid_run_name(name) == name
        return
    with pytest.raises(ConfigError, match="--run-name=") as refused:
        check_run_name("--run-name", name, tmp_path / "none")
    assert len(str(refused.value).splitlines()) == 1
    check_run_name("--run-name", valid_run_name(name), tmp_path)


def test_existing_run_may_have_any_name(tmp_path: Path) -> None:
    (tmp_path / "my run (2)").mkdir()
    check_run_name("--run-name", "my run (2)", tmp_path)


def test_config_may_have_any_name(config: Config) -> None:
    assert find_run_dir(config, StartOptions("my config (2)")).path.name == "my_config_2-20261126-120000"


# --- a start that failed early -----------------------------------------------------------------------------------

NETS = """
import os
from torch import nn
class Broken(nn.Module):
    def __init__(self):
        raise ValueError("no such size")
class BrokenOnOne(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(784, 10))
        if os.environ["RANK"] == "1":
            raise ValueError("no such size")
class Late(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(784, 10))
    def forward(self, images):
        raise ValueError("not of this shape")
"""


@pytest.mark.parametrize(
    ("settings", "stays"),
    [
        (["model.name=nets:Broken"], False),
        (["model.name=nothing:Net"], False),
        (["model.args.nothing=1"], False),
        (["model.name=nets:Broken", "--run-name=r"], True),
        (["model.name=nets:Late"], False),
        (["model.name=nets:Late", "--run-name=r"], True),
    ],
    ids=["constructor", "import", "setting", "named", "its first batch", "named, its first batch"],
)
def test_failed_start_removes_directory_of_unstarted_run(settings: list[str], stays: bool, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    done = run_forked([*DIST_TRAIN, "train", *SETTINGS, *settings], tmp_path)
    assert done.returncode in (1, 2)
    assert "error: " in done.stderr
    left = list(tmp_path.glob("runs/*"))
    assert len(left) == stays
    assert all(read_json(path / "error.json") for path in left)


@pytest.mark.parametrize(
    ("settings", "stays"),
    [
        (["model.name=nets:Broken"], False),
        (["model.name=nets:BrokenOnOne"], False),
        (["model.name=nets:Broken", "--run-name=r"], True),
        (["model.name=nets:Late"], False),
    ],
    ids=["constructor", "constructor of one rank", "named", "its first batch"],
)
def test_failed_ranks_leave_no_directory(settings: list[str], stays: bool, tmp_path: Path) -> None:
    """Of ranks that another launcher than ours started."""
    (tmp_path / "nets.py").write_text(NETS)
    done = run_forked([*DIST_TRAIN, "train", *SETTINGS, *settings], tmp_path, world_size=2)
    assert done.returncode == 1
    left = list(tmp_path.glob("runs/*"))
    assert len(left) == stays
    assert all(read_json(path / "error.json") for path in left)


@pytest.mark.parametrize(("kind", "reached", "stays"), [("UserCodeError", {}, False), ("PeerLost", {}, True),
                                                        ("UserCodeError", {"step": 0}, True)])  # fmt: skip
def test_failed_launch_removes_directory_of_unstarted_run(
    kind: str, reached: dict[str, int], stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(spec: LaunchSpec) -> int:
        write_json(spec.run_dir.status.path, {"attempt": 1, "state": "ERROR", **reached})
        write_json(spec.run_dir.error, {"kind": kind, "message": "", "rank": 1, "host": "n1"})
        raise LaunchError("failed")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs, "start_ranks", fail)
    assert CliRunner().invoke(main, ["launch", "--nproc=2", "-c", "smoke"]).exit_code == 1
    assert (tmp_path / "runs").exists() == stays


def test_directory_with_checkpoint_is_never_removed(tmp_path: Path) -> None:
    """Even if all its other files are missing or damaged."""
    run_dir = RunDir(tmp_path / "smoke-20261126-120000")
    (run_dir.checkpoints / "step_00000001").mkdir(parents=True)
    write_json(run_dir.error, {"kind": "UserCodeError", "message": "", "rank": 1, "host": "n1"})
    remove_if_not_started(run_dir, StartOptions("smoke"))
    assert run_dir.checkpoints.exists()


def test_job_of_older_version_finds_its_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older versions used any config name as the run name."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    config, start = parse_config({"runs_dir": str(tmp_path)}), StartOptions("my config (2)")
    assert find_run_dir(config, start).path.name == "my_config_2-12"
    (tmp_path / "my config (2)-12").mkdir()
    assert find_run_dir(config, start).path.name == "my config (2)-12"
