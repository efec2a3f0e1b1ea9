"""per_device_batch_size: auto. Memory that is really not there, by a limit on one rank's address space."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

from dist_train.config.batch_plan import BatchPlan
from dist_train.config.loading import parse_config
from dist_train.data.splits import load_splits
from dist_train.distributed.world import World
from dist_train.runs.directory import RunDir
from dist_train.training.micro_batch import plan_of
from support.ranks import join_group, run_on_ranks, train_on_ranks
from support.run_files import assert_bit_identical
from support.trainings import MNIST

SHARE = 509  # of a rank: a prime number, so that it is divided into micro-batches of 1 or not at all
AUTO: dict[str, Any] = {
    "per_device_batch_size": "auto", "global_batch_size": 2 * SHARE, "device": "cpu",
    "data": {"name": "support.user_sets:mnist_part", "args": {"length": 2 * SHARE}},
    "model": {"name": "conv", "args": {"num_filters": 16}},
}  # fmt: skip


def choose_on_ranks(folder: Path, limited_rank: int) -> None:
    join_group(f"micro_batch_{limited_rank}")
    config = parse_config(AUTO)
    world, splits = World.join(config), load_splits(config.data, 0)
    if world.rank == limited_rank:  # all images at once need 250 MB
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + 100 * 10**6, -1))
    plan = plan_of(config, world, splits, recorded=None)
    (folder / f"rank_{world.rank}").write_text(json.dumps(plan.per_device_batch_size))
    world.leave()


def test_size_is_the_largest_that_fits_every_rank(tmp_path: Path) -> None:
    for limited_rank, expected in ((1, 1), (-1, SHARE)):
        run_on_ranks(choose_on_ranks, tmp_path, limited_rank, world_size=2)
        assert [json.loads(path.read_text()) for path in sorted(tmp_path.iterdir())] == [expected] * 2


def test_resume_keeps_what_was_found(world: World) -> None:
    nothing: Any = None  # no data: it tries nothing
    assert plan_of(parse_config(AUTO), world, nothing, recorded=2) == BatchPlan(2, SHARE, 1)
    assert plan_of(parse_config({"global_batch_size": 64}), world, nothing, recorded=2) == BatchPlan(64, 1, 1)


def test_run_is_that_of_the_size_found(tmp_path: Path) -> None:
    """To the bit, though the trial has drawn and trained; also where a size was recorded that is not the largest."""
    settings = MNIST | {"train_for": "4 steps", "log_every": 1, "eval_every": 0, "model": {"name": "bks"}}
    for size in ("auto", 96):
        train_on_ranks(settings | {"per_device_batch_size": size}, tmp_path / str(size))
    assert_bit_identical(tmp_path / "auto", tmp_path / "96")

    train_on_ranks(settings | {"per_device_batch_size": 24}, tmp_path / "24", stop_after=2)
    train_on_ranks(settings | {"per_device_batch_size": "auto"}, tmp_path / "24")
    plan = BatchPlan(**RunDir(tmp_path / "24").read_provenance()["batch_plan"])
    assert plan == BatchPlan(24, 4, 1)

    auto = settings | {"per_device_batch_size": "auto"}
    train_on_ranks(auto, tmp_path / "moved", world_size=2, stop_after=2)
    train_on_ranks(auto, tmp_path / "moved", world_size=3)
    record = RunDir(tmp_path / "moved").read_provenance()
    assert (record["batch_plan"]["per_device_batch_size"], record["micro_batch"]) == (32, 48)


def test_any_size_is_planned_for_before_it_is_found() -> None:
    assert BatchPlan.of(parse_config(AUTO), 2) == BatchPlan(SHARE, 1, 2)
