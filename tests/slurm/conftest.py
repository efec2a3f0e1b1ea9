"""A cluster for each file of tests, and the run that nothing disturbed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm.cluster import REASON, Cluster, can_be_made
from slurm.trainings import LONG, train_here


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Of two nodes with four CPUs each, or as the module's CLUSTER says."""
    if not can_be_made():
        pytest.skip(REASON)
    asked = getattr(request.module, "CLUSTER", {})
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster", **asked) as made:
        made.env |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
        yield made


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LONG run on four ranks of this machine, without Slurm."""
    return train_here(tmp_path_factory.mktemp("undisturbed"), *LONG, "--nproc=4")
