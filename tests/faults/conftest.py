"""The undisturbed runs that others are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.trainings import HELD, trained_once


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_once(tmp_path_factory, "undisturbed", HELD, world_size=2)


@pytest.fixture(scope="session")
def undisturbed_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on one process, for what only rank zero does: to write, and to report to W&B."""
    return trained_once(tmp_path_factory, "undisturbed alone", HELD)
