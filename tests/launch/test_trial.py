"""`--try`: net and data go through a few steps before the run, in a process of their own, and nothing is left of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.processes import DIST_TRAIN
from support.ranks import run_forked, train_on_ranks
from support.run_files import contents

SMALL = [
    "-c", "smoke", "data.name=support.user_sets:Jittered", "model.args={image_size: 8, hidden: 4}", "device=cpu",
    "global_batch_size=12",
]  # fmt: skip


@pytest.fixture
def temporary(tmp_path: Path) -> str:
    (tmp_path / "tmp").mkdir()
    return f"{tmp_path}/tmp"


def test_pattern_that_matches_nothing_is_found(tmp_path: Path, temporary: str) -> None:
    """The settings alone do not show it."""
    command = [*DIST_TRAIN, "config", "validate", *SMALL, "model.freeze=[nothing]"]
    assert run_forked(command, tmp_path).returncode == 0
    done = run_forked([*command, "--try"], tmp_path, TMPDIR=temporary)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: model.freeze")
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["tmp"]


def test_run_to_be_extended_is_tried_without_it(tmp_path: Path, temporary: str) -> None:
    model = {"name": "mlp", "args": {"image_size": 8, "hidden": 4}}
    data = {"name": "support.user_sets:Jittered"}
    settings = {"model": model, "data": data, "train_for": "3 steps", "global_batch_size": 12}
    train_on_ranks(settings, tmp_path / "runs/r")
    before = contents(tmp_path)
    command = [*DIST_TRAIN, "train", "--resume=r", "--extend=5 steps", "--try"]
    assert "Add --dry-run" in run_forked(command, tmp_path).stderr
    done = run_forked([*command, "--dry-run"], tmp_path, TMPDIR=temporary)
    assert (done.returncode, done.stderr) == (0, "")
    assert "train_for: 5 steps" in done.stdout
    assert done.stdout.endswith("tried: five steps and one evaluation went through, in one process\n")
    assert contents(tmp_path) == before
