"""The run in which nothing goes wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.once import made_once
from support.ranks import run_forked
from support.trainings import let_go, train


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        let_go(folder)
        done = run_forked(train(nproc=None), folder, 2)
        assert done.returncode == 0, done.stderr

    return made_once(tmp_path_factory, "undisturbed", make) / "runs/r"
