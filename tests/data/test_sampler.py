"""The examples of each step; resident and streamed batches are equal bit for bit."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from dist_train.config.batch_plan import BatchPlan
from dist_train.config.data import DataConfig, Normalize
from dist_train.config.loading import parse_config
from dist_train.data.batches import Batches, ResidentBatches, StreamingBatches, training_batches
from dist_train.data.evaluation_batches import evaluation_batches
from dist_train.data.sampler import ShardSampler, evaluation_shard
from dist_train.data.sets.image_set import ImageSet
from dist_train.distributed.world import World
from dist_train.errors import ConfigError
from dist_train.models.nets import Mlp
from support.user_sets import Jittered

CPU = torch.device("cpu")
NORMALIZE = Normalize(mean=[0.1307, 0.5, 0.2], std=[0.3081, 0.25, 0.7])


def samplers(num_examples: int, plan: BatchPlan, seed: int = 0) -> list[ShardSampler]:
    return [ShardSampler(num_examples, plan, rank, seed) for rank in range(plan.world_size)]


def global_batch(ranks: list[ShardSampler], step: int) -> list[int]:
    """Return the examples of a step in epoch order, by interleaving the ranks' shards."""
    return torch.stack([sampler.indices(step) for sampler in ranks], dim=1).flatten().tolist()


shapes = st.tuples(st.integers(1, 200), st.integers(1, 8), st.integers(1, 4), st.integers(1, 4))


@given(shapes, st.integers(0, 2**63 - 1))
def test_epoch_visits_each_example_at_most_once(shape: tuple[int, int, int, int], seed: int) -> None:
    num_examples, per_device, micro_steps, world_size = shape
    plan = BatchPlan(per_device, micro_steps, world_size)
    if num_examples < plan.global_batch_size:
        with pytest.raises(ConfigError, match="global_batch_size"):
            samplers(num_examples, plan)
        return
    ranks = samplers(num_examples, plan, seed)
    first = ranks[0]
    for epoch in (0, 1, 5):
        steps = range(epoch * first.steps_per_epoch, (epoch + 1) * first.steps_per_epoch)
        seen = [index for step in steps for index in global_batch(ranks, step)]
        assert len(seen) == len(set(seen)) == num_examples - first.num_dropped
        assert set(seen) <= set(range(num_examples))
    assert 0 <= first.num_dropped < plan.global_batch_size


@given(st.integers(24, 200), st.integers(0, 20), st.integers(0, 3))
def test_global_batch_is_equal_for_every_division(num_examples: int, step: int, seed: int) -> None:
    whole = global_batch(samplers(num_examples, BatchPlan(24, 1, 1), seed), step)
    for per_device, micro_steps, world_size in [(12, 2, 1), (12, 1, 2), (1, 8, 3), (3, 2, 4), (2, 1, 12)]:
        assert global_batch(samplers(num_examples, BatchPlan(per_device, micro_steps, world_size), seed), step) == whole


def test_orders_of_epochs_and_seeds_differ() -> None:
    """Seed 0 epoch 1 also differs from seed 1 epoch 0, which torch's own sampler shuffles alike."""
    orders = {
        tuple(ShardSampler(100, BatchPlan(10, 1, 1), 0, seed).order(epoch).tolist())
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(orders) == 16


def test_dropped_examples_differ_between_epochs() -> None:
    sampler = ShardSampler(101, BatchPlan(10, 1, 1), 0, 0)
    assert (sampler.steps_per_epoch, sampler.num_dropped) == (10, 1)
    assert len({int(sampler.order(epoch)[-1]) for epoch in range(10)}) > 5


# --- drawn with replacement ----------------------------------------------------------------------------------------


def weighted(weights: Tensor, plan: BatchPlan, seed: int = 0) -> list[ShardSampler]:
    return [ShardSampler(len(weights), plan, rank, seed, weights) for rank in range(plan.world_size)]


def test_draws_are_equal_for_every_division() -> None:
    weights = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for step in (0, 7, 8, 20):  # in three epochs of eight
        whole = global_batch(weighted(weights, BatchPlan(24, 1, 1)), step)
        for division in [(12, 2, 1), (12, 1, 2), (4, 3, 2), (8, 1, 3), (2, 4, 3)]:
            assert global_batch(weighted(weights, BatchPlan(*division)), step) == whole


def test_draws_differ_between_epochs_and_seeds() -> None:
    orders = {
        tuple(weighted(torch.ones(50).double(), BatchPlan(10, 1, 1), seed)[0].order(epoch).tolist())
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(orders) == 16


def test_examples_are_drawn_in_proportion_to_their_weights() -> None:
    """Each within four standard deviations of the binomial distribution. The seed is fixed, and so is the outcome."""
    weights = torch.tensor([0.0, 1.0, 2.0, 0.0, 7.0, 0.0] * 1000, dtype=torch.float64)
    (sampler,) = weighted(weights, BatchPlan(100, 1, 1))
    places = torch.cat([sampler.order(epoch) for epoch in range(10)]) % 6
    counts = torch.bincount(places, minlength=6)
    assert counts[[0, 3, 5]].tolist() == [0, 0, 0]
    for place, share in ((1, 0.1), (2, 0.2), (4, 0.7)):
        deviation = (len(places) * share * (1 - share)) ** 0.5
        assert abs(int(counts[place]) - len(places) * share) < 4 * deviation


@pytest.mark.parametrize("unit", [5e-324, 1e-300, 1.0, 1e308])
def test_only_ratios_of_weights_count(unit: float) -> None:
    weights = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    (sampler,) = weighted(weights * unit, BatchPlan(6, 1, 1))
    for epoch in range(50):
        assert set(sampler.order(epoch).tolist()) <= {1, 3, 4}
        assert torch.equal(sampler.order(epoch), weighted(weights, BatchPlan(6, 1, 1))[0].order(epoch))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_iteration_yields_indices_of_each_step(rank: int) -> None:
    sampler = ShardSampler(101, BatchPlan(2, 2, 3), rank, seed=7)
    for epoch in (2, 0, 1):  # in any order: there is no state
        sampler.set_epoch(epoch)
        steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
        expected = [index for step in steps for index in sampler.indices(step).tolist()]
        assert list(sampler) == expected
        assert len(sampler) == len(expected)


@given(st.integers(0, 100), st.integers(1, 9))
@example(1, 4)  # more ranks than examples
def test_evaluation_shards_partition_examples(num_examples: int, world_size: int) -> None:
    shards = [evaluation_shard(num_examples, rank, world_size) for rank in range(world_size)]
    assert sorted(torch.cat(shards).tolist()) == list(range(num_examples))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


# --- batches -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images() -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (101, 3, 5, 4), dtype=torch.uint8, generator=generator)
    return ImageSet(pixels, torch.randint(3, (101,), generator=generator), ("a", "b", "c"))


PLAN = BatchPlan(3, 2, 2)
STEPS = [(step, micro_step) for step in range(11) for micro_step in range(2)]  # into the second epoch


def batches(
    examples: object, num_workers: int = 0, resident: bool | None = None, rank: int = 1, plan: BatchPlan = PLAN,
    weights: Tensor | None = None,
) -> Batches:  # fmt: skip
    config = DataConfig(num_workers=num_workers, resident=resident, normalize=NORMALIZE)
    sampler = ShardSampler(len(examples), plan, rank, 3, weights)  # type: ignore[arg-type]
    return training_batches(examples, sampler, config, CPU, 3)  # type: ignore[arg-type]


def batches_of(source: Batches, places: Iterable[tuple[int, int]] = STEPS) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [(b.inputs, b.targets, b.indices) for b in (source.at(*place) for place in places)]


def assert_same(one: list[tuple[Tensor, Tensor, Tensor]], other: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    assert len(one) == len(other)
    for mine, others in zip(one, other, strict=True):
        for a, b in zip(mine, others, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)  # to the bit


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resident_and_streamed_batches_are_bit_identical(num_workers: int, images: ImageSet) -> None:
    resident, streamed = batches(images), batches(images, num_workers, resident=False)
    assert isinstance(resident, ResidentBatches)
    assert isinstance(streamed, StreamingBatches)
    found = batches_of(resident)
    assert_same(batches_of(streamed), found)
    for inputs, targets, indices in found:
        assert (inputs.dtype, inputs.shape, targets.dtype) == (torch.float32, (3, 3, 5, 4), torch.int64)
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (NORMALIZE.mean, NORMALIZE.std))
        torch.testing.assert_close(inputs, (images.images[indices].float() / 255 - mean) / std, atol=1e-5, rtol=0)
        assert torch.equal(targets, images.labels[indices])


def test_micro_batches_split_shard_in_order(images: ImageSet) -> None:
    sampler = ShardSampler(101, PLAN, 1, 3)
    for step in (0, 5, 9):
        found = torch.cat([indices for _, _, indices in batches_of(batches(images), [(step, 0), (step, 1)])])
        assert torch.equal(found, sampler.indices(step))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_example_depends_only_on_seed_epoch_and_index(num_workers: int) -> None:
    """Random transforms repeat from a later step, after a jump, with any workers, for a repeated request."""
    whole = batches_of(batches(Jittered(True)))
    assert_same(batches_of(batches(Jittered(True), num_workers)), whole)
    assert_same(batches_of(batches(Jittered(True), num_workers), STEPS[7:]), whole[7:])
    source = batches(Jittered(True), num_workers)
    warm_up = [STEPS[4], STEPS[4]]  # requests the first batch twice without consuming it
    assert_same(batches_of(source, [*warm_up, *STEPS[4:]]), [whole[4], whole[4], *whole[4:]])
    assert_same(batches_of(source, STEPS[2:5]), whole[2:5])


def test_each_draw_of_an_example_is_transformed_anew() -> None:
    """The same for any division and any workers: an example drawn twice in an epoch is no copy."""
    few = torch.zeros(101, dtype=torch.float64).index_fill(0, torch.tensor([3, 50]), 1.0)

    def made(plan: BatchPlan, num_workers: int = 0) -> Tensor:
        ranks = [
            batches(Jittered(True), num_workers, rank=rank, plan=plan, weights=few) for rank in range(plan.world_size)
        ]
        places = [(step, micro_step) for step in range(9) for micro_step in range(plan.grad_accum_steps)]
        by_rank = [torch.cat([inputs for inputs, _, _ in batches_of(source, places)]) for source in ranks]
        return torch.stack(by_rank, dim=1).flatten(0, 1)

    whole = made(BatchPlan(12, 1, 1))
    assert len(whole) == 9 * 12
    assert len({image.numpy().tobytes() for image in whole}) == len(whole)
    for plan, num_workers in ((BatchPlan(3, 2, 2), 2), (BatchPlan(4, 1, 3), 0)):
        assert torch.equal(made(plan, num_workers), whole)


def test_workers_end_with_their_batches() -> None:
    source = batches(Jittered(True), num_workers=2)
    source.at(0, 0)
    source.at(5, 0)  # a jump: the workers of the first stream have ended
    assert len(multiprocessing.active_children()) == 2
    del source
    assert multiprocessing.active_children() == []


def test_repeated_batch_is_not_loaded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    requested: list[int] = []

    def note(_: Jittered, index: int) -> tuple[Tensor, int]:
        requested.append(index)
        return torch.zeros(1), 0

    monkeypatch.setattr(Jittered, "__getitem__", note)
    batches_of(batches(Jittered(True)), [STEPS[4], STEPS[4], *STEPS[4:7]])
    assert len(requested) == 3 * PLAN.per_device_batch_size


def test_each_epoch_draws_new_transforms() -> None:
    by_epoch: list[dict[int, Tensor]] = [{}, {}]
    for step in range(16):  # two epochs of eight
        for inputs, _, indices in batches_of(batches(Jittered(True)), [(step, 0), (step, 1)]):
            by_epoch[step // 8] |= dict(zip(indices.tolist(), inputs, strict=True))
    both = by_epoch[0].keys() & by_epoch[1].keys()
    assert both
    assert not any(torch.equal(by_epoch[0][index], by_epoch[1][index]) for index in both)


@pytest.mark.parametrize("resident", [None, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_batches_cover_split_once(resident: bool | None, world_size: int, images: ImageSet) -> None:
    data = {"resident": resident, "normalize": NORMALIZE.model_dump()}
    config = parse_config({"per_device_batch_size": 7, "data": data})
    seen: list[int] = []
    for rank in range(world_size):
        world = cast(World, SimpleNamespace(rank=rank, size=world_size, device=CPU))
        source = evaluation_batches(images, Mlp(), world, config)
        found = list(source)
        assert len(found) <= source.num_batches
        assert source.num_examples == 101
        for batch in found:
            assert torch.equal(batch.targets, images.labels[batch.indices])
            seen += batch.indices.tolist()
    assert sorted(seen) == list(range(101))


def test_evaluation_inputs_survive_in_place_changes(images: ImageSet) -> None:
    """Batches of small sets are reused unless the net changed them in place."""
    world = cast(World, SimpleNamespace(rank=0, size=1, device=CPU))
    source = evaluation_batches(images, Mlp(), world, parse_config({"per_device_batch_size": 7}))
    before = [batch.inputs.clone() for batch in source]
    kept = [batch.inputs for batch in source]
    assert [batch.inputs.data_ptr() for batch in source] == [batch.data_ptr() for batch in kept]
    for number, batch in enumerate(source):
        if number % 2:
            batch.inputs.neg_()
    assert all(torch.equal(batch.inputs, first) for batch, first in zip(source, before, strict=True))


def test_evaluation_workers_persist_between_passes(images: ImageSet) -> None:
    """They persist even when a pass is left early, as at an agreed stop."""
    world = cast(World, SimpleNamespace(rank=0, size=1, device=CPU))
    config = parse_config({"per_device_batch_size": 7, "data": {"resident": False, "num_workers": 2}})
    source = evaluation_batches(images, Mlp(), world, config)
    first = [batch.inputs for batch in source]
    workers = {child.pid for child in multiprocessing.active_children()}
    next(iter(source))
    again = [batch.inputs for batch in source]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert {child.pid for child in multiprocessing.active_children()} == workers
    del source
    assert multiprocessing.active_children() == []
