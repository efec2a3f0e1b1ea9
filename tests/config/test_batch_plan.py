"""Properties of the division of a global batch over ranks and micro-steps."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dist_train.config.batch_plan import BatchPlan
from dist_train.errors import ConfigError

sizes = st.integers(1, 4096)


@given(share=st.integers(1, 600), bound=sizes, world_size=st.integers(1, 64))
def test_plan_fits_exactly_with_largest_forward(share: int, bound: int, world_size: int) -> None:
    plan = BatchPlan.fit(share * world_size, bound, world_size)
    assert plan.per_device_batch_size * plan.grad_accum_steps * plan.world_size == share * world_size
    assert (plan.per_rank_batch_size, plan.global_batch_size, plan.world_size) == (
        share,
        share * world_size,
        world_size,
    )
    assert plan.per_device_batch_size <= bound
    larger = range(plan.per_device_batch_size + 1, min(bound, share) + 1)
    assert [size for size in larger if share % size == 0] == []


@given(global_batch=sizes, world_size=sizes)
def test_error_names_world_sizes_that_fit(global_batch: int, world_size: int) -> None:
    assume(global_batch % world_size)
    with pytest.raises(ConfigError) as caught:
        BatchPlan.fit(global_batch, 64, world_size)
    text = str(caught.value)
    assert f"global_batch_size={global_batch} is not a multiple of world_size={world_size}" in text
    match = re.search(r"World sizes that fit: ([\d, ]+)\.", text)
    assert match
    offered = [int(size) for size in match[1].split(", ")]
    assert offered == sorted(set(offered))
    for size in offered:
        assert BatchPlan.fit(global_batch, 64, size).global_batch_size == global_batch
    nearest = min(
        (size for size in range(1, global_batch + 1) if global_batch % size == 0), key=lambda d: abs(d - world_size)
    )
    assert abs(nearest - world_size) in {abs(size - world_size) for size in offered}


def test_error_shows_arithmetic() -> None:
    with pytest.raises(ConfigError, match=r"\(3 x 33 = 99\)\. World sizes that fit: 1, 2, 4, 5, 10, 20\."):
        BatchPlan.fit(100, 64, 3)


@given(num_examples=sizes, global_batch=st.integers(1, 512))
def test_steps_per_epoch(num_examples: int, global_batch: int) -> None:
    plan = BatchPlan.fit(global_batch, 64, 1)
    if num_examples < global_batch:
        with pytest.raises(ConfigError, match=f"Set global_batch_size to at most {num_examples}"):
            plan.check_epoch(num_examples)
    else:
        steps = plan.check_epoch(num_examples)
        assert steps * global_batch <= num_examples < (steps + 1) * global_batch


def test_plan_is_described_in_words() -> None:
    assert BatchPlan.fit(64, 1024, 2).describe() == "global batch 64 = 32 per device x 1 micro-step x 2 processes"
    assert BatchPlan.fit(64, 16, 1).describe() == "global batch 64 = 16 per device x 4 micro-steps x 1 process"
