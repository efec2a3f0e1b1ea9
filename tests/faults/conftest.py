"""How many faults there are to be: all of them, or the part that every test session can afford. And the run without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support.processes import run
from support.trainings import train


@pytest.fixture
def count(request: pytest.FixtureRequest) -> Callable[[int], int]:
    """Of so many faults in full, how many to put in now. They are numbered, and the first are the same each time."""
    everything = request.config.getoption("--all-faults")
    return lambda full: full if everything else max(1, full // 10)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = run(train(), folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs/r"
