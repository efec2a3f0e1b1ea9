"""Random shifts and flips: the drawn values, their division over ranks, and a reference implementation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dist_train.config.batch_plan import BatchPlan
from dist_train.config.schema import AugmentConfig, DataConfig
from dist_train.data.batches import Batches, training_batches
from dist_train.data.sampler import ShardSampler
from dist_train.data.sets.image_set import ImageSet
from dist_train.data.transforms import Augment
from support.processes import DIST_TRAIN
from support.ranks import run_forked

CPU = torch.device("cpu")
GLOBAL = 24


@pytest.fixture(scope="module")
def images() -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(1, 256, (100, 3, 7, 9), dtype=torch.uint8, generator=generator)  # no black pixels
    return ImageSet(pixels, torch.arange(100) % 4, tuple("abcd"))


def batches(images: ImageSet, plan: BatchPlan, rank: int, **settings: object) -> Batches:
    config = DataConfig.model_validate({"augment": {"shift": 2, "flip": True}, **settings})
    return training_batches(images, ShardSampler(len(images), plan, rank, 5), config, CPU, seed=5)


def by_example(images: ImageSet, plan: BatchPlan, step: int, **settings: object) -> dict[int, Tensor]:
    """Return the images of one global batch from all ranks."""
    found: dict[int, Tensor] = {}
    for rank in range(plan.world_size):
        source = batches(images, plan, rank, **settings)
        for micro_step in range(plan.grad_accum_steps):
            batch = source.at(step, micro_step)
            found |= dict(zip(batch.indices.tolist(), batch.inputs, strict=True))
    return found


@pytest.mark.parametrize(
    ("plan", "settings"),
    [
        (BatchPlan(12, 1, 2), {}),
        (BatchPlan(2, 4, 3), {}),
        (BatchPlan(8, 3, 1), {"resident": False}),
        (BatchPlan(4, 3, 2), {"resident": False, "num_workers": 2}),
    ],
    ids=["two", "three-micro", "streamed-micro", "workers"],
)
def test_images_are_equal_for_any_division(plan: BatchPlan, settings: dict[str, object], images: ImageSet) -> None:
    for step in (0, 3, 4, 9):  # four steps per epoch
        whole, divided = by_example(images, BatchPlan(GLOBAL, 1, 1), step), by_example(images, plan, step, **settings)
        assert len(whole) == GLOBAL
        assert whole.keys() == divided.keys()
        assert all(torch.equal(whole[index], divided[index]) for index in whole)


def test_images_equal_reference_loop(images: ImageSet) -> None:
    augment = Augment(AugmentConfig(shift=2, flip=True), BatchPlan(GLOBAL, 1, 1), 0, 5, CPU)
    corners, flips = augment.draw(0, 0)
    made = augment(images.images[:GLOBAL], corners, flips)
    for number in range(GLOBAL):
        down, right = (2 - corners[number]).tolist()
        expected = torch.zeros(3, 7, 9, dtype=torch.uint8)
        for row in range(7):
            for column in range(9):
                if 0 <= row - down < 7 and 0 <= column - right < 9:
                    expected[:, row, column] = images.images[number, :, row - down, column - right]
        assert torch.equal(made[number], expected.flip(-1) if flips[number] else expected)


def test_shifts_and_flips_are_uniform() -> None:
    """Uniform draws: 500 steps of 24, five positions per axis; a count is off by more than 5 sigma once in 10^5."""
    augment = Augment(AugmentConfig(shift=2, flip=True), BatchPlan(GLOBAL, 1, 1), 0, 5, CPU)
    drawn = [augment.draw(step, 0) for step in range(500)]
    corners, flips = torch.cat([each[0] for each in drawn]), torch.cat([each[1] for each in drawn])
    total = 500 * GLOBAL
    for axis in (0, 1):
        counts = torch.bincount(corners[:, axis])
        assert len(counts) == 5
        assert (counts - total / 5).abs().max() < 5 * (total * 0.2 * 0.8) ** 0.5
    assert abs(int(flips.sum()) - total / 2) < 5 * (total / 4) ** 0.5


def test_shift_of_zero_changes_nothing(images: ImageSet) -> None:
    plan = BatchPlan(GLOBAL, 1, 1)
    plain, off = batches(images, plan, 0, augment=None), batches(images, plan, 0, augment={"shift": 0})
    assert torch.equal(plain.at(0, 0).inputs, off.at(0, 0).inputs)


def test_augment_is_refused_for_data_with_its_own_transforms(tmp_path: Path) -> None:
    settings = ["data.name=support.user_sets:Jittered", "data.augment.shift=2", "--fast-dev-run"]
    done = run_forked([*DIST_TRAIN, "train", "-c", "smoke", *settings], tmp_path)
    assert done.returncode == 2
    assert (
        "data.augment does not apply to data.name=support.user_sets:Jittered, which has its own transforms"
        in done.stderr
    )
