"""The audit of an epoch: counted from what was gathered, over all ranks, however often it was stopped."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dist_train.audit import ShardAudit
from dist_train.batching import ShardSampler
from dist_train.config_file import parse_config
from dist_train.distributed import World
from dist_train.errors import DistTrainError
from dist_train.plan import BatchPlan
from support.processes import DIST_TRAIN
from support.ranks import join_group, run_forked, run_on_ranks
from support.run_files import metrics

TRAIN = [*DIST_TRAIN, "train", "-q", "-c", "smoke", "--run-name=r"]


def sampler_of(world_size: int, rank: int) -> ShardSampler:
    return ShardSampler(1003, BatchPlan.fit(10, 10, world_size), rank, seed=3)


@pytest.mark.parametrize("began_at", [0, 1, 57, 99])
def test_a_whole_epoch_and_the_next(world: World, began_at: int) -> None:
    sampler = sampler_of(1, 0)
    audit = ShardAudit(sampler, world, began_at)
    for step in range(began_at, 100):
        audit.note(sampler.indices(step))
    assert audit.close_epoch(1) == {"audit/unique": 1000, "audit/duplicate": 0, "audit/dropped": 3}
    for step in range(100, 200):
        audit.note(sampler.indices(step))
    assert audit.close_epoch(2)["audit/unique"] == 1000


def test_streamed_indices_on_another_device(world: World) -> None:
    """Of a resumed epoch the earlier ones lie on the device that trains."""
    elsewhere = SimpleNamespace(device=torch.device("meta"))
    audit = ShardAudit(sampler_of(1, 0), elsewhere, 57)  # type: ignore[arg-type]
    for _ in range(300):
        audit.note(torch.tensor([0]))


@pytest.mark.parametrize("batches", [1, 255, 256, 257, 600])
def test_counted_in_chunks(world: World, batches: int) -> None:
    audit = ShardAudit(sampler_of(1, 0), world, 0)
    for number in range(batches):
        audit.note(torch.tensor([number]))
    assert audit.close_epoch(1)["audit/unique"] == batches


def test_an_example_twice_is_an_error(world: World) -> None:
    sampler = sampler_of(1, 0)
    audit = ShardAudit(sampler, world, 0)
    for step in range(100):
        audit.note(sampler.indices(step if step != 70 else 10))
    with pytest.raises(DistTrainError, match="Epoch 1: 10 of 1003 examples were trained on more than once"):
        audit.close_epoch(1)


def _on_two_ranks(same: bool) -> None:
    join_group("audit")
    world = World.join(parse_config({"device": "cpu"}))
    sampler = sampler_of(2, 0 if same else world.rank)
    audit = ShardAudit(sampler, world, 0)
    for step in range(100):
        audit.note(sampler.indices(step))
    if same:
        with pytest.raises(DistTrainError, match="500 of 1003"):
            audit.close_epoch(1)
    else:
        assert audit.close_epoch(1)["audit/unique"] == 1000


@pytest.mark.parametrize("same", [False, True])
def test_over_the_ranks(same: bool) -> None:
    run_on_ranks(_on_two_ranks, same, world_size=2)


@pytest.mark.parametrize("resident", ["true", "false"])
def test_a_line_for_each_epoch(resident: str, tmp_path: Path) -> None:
    """60 000 examples in batches of 7000: 8 steps and 4000 dropped in an epoch; then half of one."""
    settings = ["global_batch_size=7000", "train_for=20 steps", f"data.resident={resident}", "final_train_eval=false"]
    assert run_forked([*TRAIN, *settings], tmp_path).returncode == 0
    lines = [line for line in metrics(tmp_path / "runs/r") if "audit/unique" in line]
    found = [(line["step"], line["audit/unique"], line["audit/dropped"]) for line in lines]
    assert found == [(8, 56_000, 4000), (16, 56_000, 4000), (20, 28_000, 32_000)]
