"""The epoch audit: it counts gathered examples over all ranks and across any number of restarts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dist_train.config.batch_plan import BatchPlan
from dist_train.config.loading import parse_config
from dist_train.data.epoch_audit import ShardAudit
from dist_train.data.sampler import ShardSampler
from dist_train.distributed.world import World
from dist_train.errors import CheckpointError, DistTrainError
from support.processes import DIST_TRAIN
from support.ranks import join_group, run_forked, run_on_ranks
from support.run_files import metrics

TRAIN = [*DIST_TRAIN, "train", "-q", "-c", "smoke", "--run-name=r"]


# A third of the examples are never drawn.
WEIGHTS = torch.arange(1003, dtype=torch.float64) % 3


def sampler_of(world_size: int, rank: int, weights: torch.Tensor | None = None, seed: int = 3) -> ShardSampler:
    return ShardSampler(1003, BatchPlan.fit(10, 10, world_size), rank, seed, weights)


@pytest.mark.parametrize("began_at", [0, 1, 57, 99])
def test_totals_of_consecutive_epochs(world: World, began_at: int) -> None:
    sampler = sampler_of(1, 0)
    audit = ShardAudit(sampler, world, began_at)
    for step in range(began_at, 100):
        audit.add(sampler.indices(step))
    unaudited = {"audit/believed": 10 * began_at} if began_at else {}  # as if an older version saved no totals
    seen = {"audit/unique": 1000 - 10 * began_at, "audit/duplicate": 0, "audit/dropped": 3}
    assert audit.close_epoch(100) == seen | unaudited
    for step in range(100, 200):
        audit.add(sampler.indices(step))
    assert audit.close_epoch(200) == {"audit/unique": 1000, "audit/duplicate": 0, "audit/dropped": 3}


def test_streamed_indices_on_another_device(world: World) -> None:
    """The hash sum is on the training device."""
    elsewhere = SimpleNamespace(device=torch.device("meta"), is_rank_zero=True)
    audit = ShardAudit(sampler_of(1, 0), elsewhere, 0)  # type: ignore[arg-type]
    for _ in range(300):
        audit.add(torch.tensor([0]))


@pytest.mark.parametrize("batches", [1, 255, 256, 257, 600])
def test_totals_are_summed_in_chunks(world: World, batches: int) -> None:
    sampler = ShardSampler(1003, BatchPlan.fit(1, 1, 1), 0, seed=3)
    audit = ShardAudit(sampler, world, 0)
    for step in range(batches):
        audit.add(sampler.indices(step))
    assert audit.close_epoch(batches)["audit/unique"] == batches
    assert audit.close_epoch(batches)["audit/unique"] == batches  # the epoch is not over


@pytest.mark.parametrize(("instead", "message"), [(10, "1000 examples .* not the first 1000"), (None, "990 examples ")])
def test_repeated_or_missing_example_raises(instead: int | None, message: str, world: World) -> None:
    sampler = sampler_of(1, 0)
    audit = ShardAudit(sampler, world, 0)
    for step in range(100):
        if step != 70:
            audit.add(sampler.indices(step))
        elif instead is not None:
            audit.add(sampler.indices(instead))
    with pytest.raises(DistTrainError, match=f"Epoch 1: the {message}"):
        audit.close_epoch(100)


def test_draws_with_replacement_are_counted(world: World) -> None:
    sampler = sampler_of(1, 0, WEIGHTS)
    audit = ShardAudit(sampler, world, 0)
    for step in range(157):
        audit.add(sampler.indices(step))
        if step == 99:
            first = audit.close_epoch(100)
    different = len(set(sampler.order(0)[:1000].tolist()))
    assert first == {"audit/unique": different, "audit/duplicate": 1000 - different, "audit/dropped": 1003 - different}
    assert different < 669
    second = audit.close_epoch(157)
    assert second["audit/unique"] + second["audit/duplicate"] == 570
    assert ShardAudit(sampler, world, 157, audit.totals()).close_epoch(157) == second


@pytest.mark.parametrize("instead", ["one never drawn", "one drawn elsewhere", "a uniform draw"])
def test_wrong_draw_raises(instead: str, world: World) -> None:
    """Of the 1000 examples of the epoch one is another, which a count of duplicates would not tell."""
    sampler = sampler_of(1, 0, WEIGHTS)
    audit = ShardAudit(sampler, world, 0)
    wrong = {"one never drawn": 0, "one drawn elsewhere": int(sampler.order(0)[500]), "a uniform draw": 77}[instead]
    for step in range(100):
        indices = sampler.indices(step).clone()
        if step == 70:
            assert indices[4] != wrong
            indices[4] = wrong
        audit.add(indices)
    with pytest.raises(DistTrainError, match=r"Epoch 1: the 1000 examples .* are not the first 1000 of its order"):
        audit.close_epoch(100)


@pytest.mark.parametrize("stopped_at", [1, 57, 100, 157])
def test_resume_continues_count(stopped_at: int, world: World) -> None:
    """The count also continues when the sharding differs before and after the resume."""
    first, then = ShardAudit(sampler_of(1, 0), world, 0), sampler_of(1, 0)
    for step in range(stopped_at):
        first.add(torch.cat([sampler_of(2, rank).indices(step) for rank in (1, 0)]))
        if step == 99:
            first.close_epoch(100)
    resumed = ShardAudit(then, world, stopped_at, first.totals())
    end = 200 if stopped_at > 99 else 100
    for step in range(stopped_at, end):
        resumed.add(then.indices(step))
    assert resumed.close_epoch(end) == {"audit/unique": 1000, "audit/duplicate": 0, "audit/dropped": 3}


def test_resume_after_different_examples_is_refused(world: World) -> None:
    audit = ShardAudit(sampler_of(1, 0), world, 0)
    audit.add(torch.arange(10))
    with pytest.raises(CheckpointError, match=r"The 10 examples of epoch 1 .* are not the first 10 of its order"):
        ShardAudit(sampler_of(1, 0), world, 1, audit.totals())
    with pytest.raises(CheckpointError, match=r"The 10 examples of epoch 1 .* are not the first 20 of its order"):
        ShardAudit(sampler_of(1, 0), world, 2, audit.totals())


def test_unaudited_examples_stay_unaudited(world: World) -> None:
    sampler = sampler_of(1, 0)
    first = ShardAudit(sampler, world, 30)
    for step in range(30, 57):
        first.add(sampler.indices(step))
    second = ShardAudit(sampler, world, 57, first.totals())
    for step in range(57, 100):
        second.add(sampler.indices(step))
    line = {"audit/unique": 700, "audit/duplicate": 0, "audit/believed": 300, "audit/dropped": 3}
    assert second.close_epoch(100) == line
    assert second.totals() == {"seen": 0, "hash": 0, "believed": 0}  # the next epoch begins


def test_late_resume_reads_one_slice(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not read the indices of each earlier step: for an epoch of 10^6 steps those took 13 s and 756 MiB."""
    sampler = ShardSampler(10**5, BatchPlan.fit(1, 1, 1), 0, seed=3)
    monkeypatch.setattr(ShardSampler, "indices", None)
    assert ShardAudit(sampler, world, 99_999).totals()["seen"] == 99_999


def _on_two_ranks(fault: str, weights: torch.Tensor | None) -> None:
    join_group("audit")
    world = World.join(parse_config({"device": "cpu"}))
    rank, seed = 0 if fault == "shard" else world.rank, 3 + world.rank * (fault == "generator")
    sampler = sampler_of(2, rank, weights, seed)
    audit = ShardAudit(sampler, world, 0)
    for step in range(100):
        audit.add(sampler.indices(step))
    if fault:
        with pytest.raises(DistTrainError, match="Epoch 1: the 1000 examples"):
            audit.close_epoch(100)
    else:
        line = audit.close_epoch(100)
        assert line["audit/unique"] + line["audit/duplicate"] == 1000


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["shuffled", "weighted"])
@pytest.mark.parametrize("fault", ["", "shard", "generator"])
def test_audit_covers_all_ranks(fault: str, weights: torch.Tensor | None) -> None:
    """Both ranks take the same shard, or each draws with a generator of its own."""
    run_on_ranks(_on_two_ranks, fault, weights, world_size=2)


@pytest.mark.parametrize("resident", ["true", "false"])
def test_each_epoch_writes_one_line(resident: str, tmp_path: Path) -> None:
    """60 000 examples in batches of 7000: 8 steps and 4000 dropped per epoch, then half an epoch."""
    settings = ["global_batch_size=7000", "train_for=20 steps", f"data.resident={resident}", "final_train_eval=false"]
    assert run_forked([*TRAIN, *settings], tmp_path).returncode == 0
    lines = [line for line in metrics(tmp_path / "runs/r") if "audit/unique" in line]
    found = [(line["step"], line["audit/unique"], line["audit/dropped"]) for line in lines]
    assert found == [(8, 56_000, 4000), (16, 56_000, 4000), (20, 28_000, 32_000)]
