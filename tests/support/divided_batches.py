"""Training batches of random images, and whether they are the same for every division of the global batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from torch import Tensor

from dist_train.config.batch_plan import BatchPlan
from dist_train.config.data import DataConfig
from dist_train.data.batches import Batch, Batches, training_batches
from dist_train.data.sampler import ShardSampler
from dist_train.data.sets.image_set import ImageSet

GLOBAL = 24
WHOLE = BatchPlan(GLOBAL, 1, 1)
STEPS = (0, 3, 4, 9)  # four steps per epoch
every_division = pytest.mark.parametrize(
    ("plan", "settings"),
    [
        (BatchPlan(12, 1, 2), {}),
        (BatchPlan(2, 4, 3), {}),
        (BatchPlan(8, 3, 1), {"resident": False}),
        (BatchPlan(4, 3, 2), {"resident": False, "num_workers": 2}),
    ],
    ids=["two", "three-micro", "streamed-micro", "workers"],
)
Rows = Callable[[Batch], Iterable[tuple[Tensor, ...]]]  # what each example of a batch has become


def random_images() -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(1, 256, (100, 3, 7, 9), dtype=torch.uint8, generator=generator)  # no black pixels
    return ImageSet(pixels, torch.arange(100) % 4, tuple("abcd"))


def batches(images: ImageSet, plan: BatchPlan, rank: int, **settings: object) -> Batches:
    """Return a rank's batches. `settings`: of the data."""
    config = DataConfig.model_validate(settings)
    return training_batches(images, ShardSampler(len(images), plan, rank, 5), config, torch.device("cpu"), seed=5)


def check_division(
    images: ImageSet, plan: BatchPlan, steps: Sequence[int], rows: Rows, augment: object, **settings: object
) -> None:
    """Check that ranks and micro-batches make of each example what one rank with one batch makes of it."""
    sources = [batches(images, plan, rank, augment=augment, **settings) for rank in range(plan.world_size)]
    for step in steps:
        whole = _by_example([batches(images, WHOLE, 0, augment=augment)], WHOLE, step, rows)
        divided = _by_example(sources, plan, step, rows)
        assert len(whole) == GLOBAL
        assert whole.keys() == divided.keys()
        assert all(torch.equal(*pair) for key in whole for pair in zip(whole[key], divided[key], strict=True))


def _by_example(sources: list[Batches], plan: BatchPlan, step: int, rows: Rows) -> dict[int, tuple[Tensor, ...]]:
    found: dict[int, tuple[Tensor, ...]] = {}
    for source in sources:
        for micro_step in range(plan.grad_accum_steps):
            batch = source.at(step, micro_step)
            assert len(batch) == len(batch.inputs) == plan.per_device_batch_size
            found |= dict(zip(batch.indices.tolist(), rows(batch), strict=True))
    return found
