"""A cluster, and the undisturbed run to compare with."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_train.runs.directory import RunDir
from support.cluster import REASON, Cluster, can_be_made
from support.jobs import LONG, Check
from support.ranks import ONLY_GLOO
from support.run_files import assert_bit_identical
from support.trainings import trained_once


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of three nodes with four CPUs. Most jobs take two nodes; one is spare. Each pytest worker has one."""
    if not can_be_made():
        pytest.skip(REASON)
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster", nodes=3) as made:
        made.env |= {"PYTHON": sys.executable, "WANDB_MODE": "offline"}
        yield made


@pytest.fixture(autouse=True)
def _idle_nodes(cluster: Cluster, tmp_path: Path) -> Iterator[None]:
    """Leave all nodes idle for the next test. Print the ends of the logs, which pytest shows if a test fails."""
    seen = cluster.log.stat().st_size
    yield
    cluster.repair()
    for log in sorted(tmp_path.glob("*.out")):
        print(f"--- {log.name}", *_without_stacks(log.read_text(errors="replace"))[-15:], sep="\n")
    with cluster.log.open() as file:
        file.seek(seen)
        print("--- the controller", *[line for line in file.read().splitlines() if "JobId=" in line][-30:], sep="\n")


def _without_stacks(log: str) -> list[str]:
    """Return the log's lines without torchrun's stacks, which fill a screen after each signal."""
    return [line[:200] for line in log.splitlines() if "torch/distributed" not in line and "^^^^" not in line]


@pytest.fixture(scope="session")
def assert_undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Check:
    """A function that asserts that a LONG run equals one on as many ranks of this machine, without Slurm.

    Its ranks exchange gradients as those of the run did, which were on several nodes or on one.
    """

    def compare(run_dir: Path) -> None:
        provenance = RunDir(run_dir).read_provenance()
        world_size, exchange = provenance["world_size"], provenance["exchange"]
        env = {ONLY_GLOO: "1"} if exchange == "gloo" else {}
        undisturbed = trained_once(tmp_path_factory, f"long on {world_size} over {exchange}", LONG, world_size, **env)
        assert_bit_identical(run_dir, undisturbed)

    return compare
