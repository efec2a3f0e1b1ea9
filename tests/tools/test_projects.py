"""`dist-train new` makes a folder that trains, passes its test and can be submitted, as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.processes import DIST_TRAIN, run
from support.ranks import run_forked
from support.run_files import status


def new(folder: Path, name: str) -> subprocess.CompletedProcess[str]:
    return run_forked([*DIST_TRAIN, "new", "--", name], folder)


def test_new_folder_trains_and_passes_its_test(tmp_path: Path) -> None:
    printed = new(tmp_path, "mine").stdout
    assert printed.endswith("\ncd mine && dist-train train -c config.yaml\n")
    made = {path.name for path in (tmp_path / "mine").iterdir()}
    assert made == {"config.yaml", "net.py", "data_set.py", "test_training.py", "job.sbatch"}
    done = run_forked([*DIST_TRAIN, "train", "-c", "config.yaml", "--run-name=r"], tmp_path / "mine", 2)
    assert done.returncode == 0, done.stderr
    assert status(tmp_path / "mine/runs/r") == "FINISHED"
    assert run_forked([*DIST_TRAIN, "config", "validate", "-c", "config.yaml"], tmp_path / "mine").returncode == 0
    tested = run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], tmp_path / "mine")
    assert "1 passed" in tested.stdout, tested.stdout


def test_batch_script_of_new_folder(tmp_path: Path) -> None:
    new(tmp_path, "mine")
    script = (tmp_path / "mine/job.sbatch").read_text()
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert " -m dist_train train -c config.yaml &" in script.replace("\\\n", "")
    assert "--job-name=mine" in script


@pytest.mark.parametrize("name", ["", "../up", "a b", "-x", ".hidden", "a/b", "x" * 300, "a\nb"])
def test_names_that_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    done = new(tmp_path / "here", name)
    assert done.returncode == 2
    assert "for example " in done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


def test_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert "mine exists already" in new(tmp_path, "mine").stderr
    assert list((tmp_path / "mine").iterdir()) == []
