"""Random changes of images: the drawn values, their division over ranks, and reference implementations."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_train.config.augment import AugmentConfig
from dist_train.config.batch_plan import BatchPlan
from dist_train.data.augment import Augment
from dist_train.data.sampler import ShardSampler
from dist_train.data.sets.image_set import ImageSet
from dist_train.data.transforms import Pixels
from dist_train.distributed.rng import derive_seed
from dist_train.torchvision_compat import import_torchvision
from support.divided_batches import GLOBAL, STEPS, WHOLE, batches, check_division, every_division, random_images
from support.processes import DIST_TRAIN
from support.ranks import run_forked

CPU = torch.device("cpu")
PIXELS = Pixels(None, CPU)


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return random_images()


EACH = {
    "shift and flip": {"shift": 2, "flip": True},
    "the rest": {"scale": [0.3, 1.0], "flip": "alternate", "brightness": 0.4, "contrast": 0.4, "saturation": 0.4,
                 "cutout": 3},
}  # fmt: skip


def changed(augment: Augment, images: Tensor, *drawn: Tensor) -> Tensor:
    inputs, _ = augment(images, torch.zeros(len(images)), *drawn)
    return inputs


def torchvision_functions() -> Any:
    import_torchvision()
    return import_module("torchvision.transforms.v2.functional")


def augment_of(**settings: object) -> Augment:
    sampler = ShardSampler(100, WHOLE, 0, 5)
    return Augment(AugmentConfig.model_validate(settings), sampler, PIXELS, CPU)


@pytest.mark.parametrize("augment", EACH.values(), ids=EACH)
@every_division
def test_images_are_equal_for_any_division(
    plan: BatchPlan, settings: dict[str, object], augment: dict[str, object], images: ImageSet
) -> None:
    for step in STEPS:  # begun anew at each, as by a resume
        check_division(images, plan, [step], lambda batch: zip(batch.inputs, strict=True), augment, **settings)


@pytest.mark.parametrize(("padding_mode", "numpy_mode"), [("constant", "constant"), ("reflect", "reflect")])
def test_shift_and_flip_equal_reference(padding_mode: str, numpy_mode: Any, images: ImageSet) -> None:
    augment = augment_of(shift=2, flip=True, padding_mode=padding_mode)
    corners, flips = augment.draw(0, 0)
    made = changed(augment, images.images[:GLOBAL], corners, flips)
    for number, (row, column) in enumerate(corners.tolist()):
        padded = np.pad(images.images[number].numpy(), ((0, 0), (2, 2), (2, 2)), mode=numpy_mode)
        expected = torch.from_numpy(padded[:, row : row + 7, column : column + 9].copy())
        assert torch.equal(made[number], PIXELS(expected.flip(-1) if flips[number] else expected))


def test_shifts_and_flips_are_uniform() -> None:
    """Uniform draws: 500 steps of 24, five positions per axis; a count is off by more than 5 sigma once in 10^5."""
    augment = augment_of(shift=2, flip=True)
    drawn = [augment.draw(step, 0) for step in range(500)]
    corners, flips = torch.cat([each[0] for each in drawn]), torch.cat([each[1] for each in drawn])
    total = 500 * GLOBAL
    for axis in (0, 1):
        counts = torch.bincount(corners[:, axis])
        assert len(counts) == 5
        assert (counts - total / 5).abs().max() < 5 * (total * 0.2 * 0.8) ** 0.5
    assert abs(int(flips.sum()) - total / 2) < 5 * (total / 4) ** 0.5


def test_draws_of_shift_and_flip_are_those_of_older_versions() -> None:
    """Their runs are resumed to the bit."""
    generator = torch.Generator().manual_seed(derive_seed(5, "augment", 7))
    corners, flips = torch.randint(5, (GLOBAL, 2), generator=generator), torch.rand(GLOBAL, generator=generator) < 0.5
    for others in ({}, {"contrast": 0.1, "cutout": 2}):
        drawn = augment_of(shift=2, flip=True, **others).draw(7, 0)
        assert torch.equal(drawn[0], corners)
        assert torch.equal(drawn[1], flips)


def test_alternating_flip_mirrors_each_example_in_every_other_epoch() -> None:
    """96 of 100 examples per epoch; half of them in the first, which is off by more than 5 sigma once in 10^6."""
    augment, sampler = augment_of(flip="alternate"), ShardSampler(100, WHOLE, 0, 5)
    first: dict[int, bool] = {}
    for step in range(16):  # four epochs
        _, flips = augment.draw(step, 0)
        for index, flipped in zip(sampler.indices(step).tolist(), flips.tolist(), strict=True):
            is_odd = step // 4 % 2 == 1
            assert first.setdefault(index, flipped ^ is_odd) == flipped ^ is_odd
    assert abs(sum(first.values()) - len(first) / 2) < 25


def test_resized_part_equals_torchvision() -> None:
    """The part of rows 2 to 8 and columns 4 to 14 of images of 16."""
    resized_crop = torchvision_functions().resized_crop
    pixels = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    part = torch.tensor([2, 4, 6, 10]) / 16
    made = changed(augment_of(scale=[0.3, 1]), pixels, part.expand(3, 4))
    expected = resized_crop(pixels / 255, 2, 4, 6, 10, [16, 16], antialias=False)
    assert torch.allclose(made, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("ratio", [[0.75, 4 / 3], [0.2, 0.3], [2, 3]])
def test_parts_have_the_scale_and_ratio(ratio: list[float]) -> None:
    """Where no part of that area and ratio fits, the largest in the centre; the drawn areas fill their range."""
    augment = augment_of(scale=[0.1, 1], ratio=ratio)
    top, left, height, width = torch.cat([augment.draw(step, 0)[0] for step in range(50)]).T
    areas = height * width
    assert ((width / height) > ratio[0] - 1e-4).all()
    assert ((width / height) < ratio[1] + 1e-4).all()
    assert min(top.min(), left.min()) >= 0
    assert max((top + height).max(), (left + width).max()) <= 1 + 1e-6
    largest = min(ratio[1], 1 / ratio[0], 1)
    assert areas.min() < 0.1 + 0.05
    assert largest - 0.05 < areas.max() < largest + 1e-6


def test_colours_equal_torchvision(images: ImageSet) -> None:
    functional = torchvision_functions()
    augment = augment_of(brightness=0.5, contrast=0.5, saturation=1.5)
    corners, factors = augment.draw(0, 0)
    assert (factors.min(dim=0).values >= torch.tensor([0.5, 0.5, 0.0])).all()
    assert (factors.max(dim=0).values <= torch.tensor([1.5, 1.5, 2.5])).all()
    made = changed(augment, images.images[:GLOBAL], corners, factors)
    for number, (brightness, contrast, saturation) in enumerate(factors.tolist()):
        expected = functional.adjust_brightness(images.images[number] / 255, brightness)
        expected = functional.adjust_saturation(functional.adjust_contrast(expected, contrast), saturation)
        assert torch.allclose(made[number], expected, rtol=0, atol=1e-5)


def test_cutout_equals_reference_loop(images: ImageSet) -> None:
    augment = augment_of(cutout=3)
    corners, centres = augment.draw(0, 0)
    made = changed(augment, images.images[:GLOBAL], corners, centres)
    for number, (row, column) in enumerate((centres * torch.tensor([7, 9])).long().tolist()):
        expected = images.images[number].clone()
        expected[:, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2] = 0
        assert torch.equal(made[number], PIXELS(expected))


def test_shift_of_zero_changes_nothing(images: ImageSet) -> None:
    plain, off = batches(images, WHOLE, 0, augment=None), batches(images, WHOLE, 0, augment={"shift": 0})
    assert torch.equal(plain.at(0, 0).inputs, off.at(0, 0).inputs)


def test_augment_is_refused_for_data_with_its_own_transforms(tmp_path: Path) -> None:
    settings = ["data.name=support.user_sets:Jittered", "data.augment.shift=2", "--fast-dev-run"]
    done = run_forked([*DIST_TRAIN, "train", "-c", "smoke", *settings], tmp_path)
    assert done.returncode == 2
    assert (
        "data.augment does not apply to data.name=support.user_sets:Jittered, which has its own transforms"
        in done.stderr
    )
