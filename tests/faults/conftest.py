"""The undisturbed run that others are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.trainings import HELD, trained_once


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_once(tmp_path_factory, "undisturbed", HELD, world_size=2)
