"""torchvision's transforms by name: seeded by example, of the whole picture of a file, checked before the start."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dist_train.config.augment import TRANSFORMS
from dist_train.config.batch_plan import BatchPlan
from dist_train.config.data import DataConfig
from dist_train.config.loading import parse_config
from dist_train.data.batches import training_batches
from dist_train.data.picture_transforms import PictureTransforms
from dist_train.data.sampler import ShardSampler
from dist_train.data.sets.image_folder import ImageFolder
from dist_train.data.sets.image_set import Examples, ImageSet, num_examples, subset_of
from dist_train.data.splits import load_splits
from dist_train.distributed.rng import derive_seed, seeded
from dist_train.errors import ConfigError
from dist_train.torchvision_compat import import_torchvision

NAMED: list[Any] = ["RandomResizedCrop", {"RandAugment": {"magnitude": 20}}]
WHOLE = BatchPlan(12, 1, 1)
REQUIRED: dict[str, dict[str, Any]] = {
    "GaussianBlur": {"kernel_size": 3}, "Pad": {"padding": 2}, "RandomAdjustSharpness": {"sharpness_factor": 2},
    "RandomAffine": {"degrees": 10}, "RandomPosterize": {"bits": 4}, "RandomRotation": {"degrees": 10},
    "RandomSolarize": {"threshold": 128}, "ElasticTransform": {"sigma": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def images() -> ImageSet:
    pixels = torch.randint(256, (30, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(pixels, torch.arange(30) % 3, tuple("abc"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of eight pictures that are twice as wide as high."""
    root, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(16):
            path = root / split / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(256, size=(20, 40, 3), dtype=np.uint8)).save(path)
    return root


def made(examples: Examples, plan: BatchPlan, step: int, **settings: Any) -> dict[int, Tensor]:
    """Return the images of one global batch from all ranks, uint8."""
    config = DataConfig.model_validate({"transforms": NAMED, **settings})
    found: dict[int, Tensor] = {}
    for rank in range(plan.world_size):
        sampler = ShardSampler(num_examples(examples), plan, rank, 5)
        source = training_batches(examples, sampler, config, torch.device("cpu"), seed=5)
        for micro_step in range(plan.grad_accum_steps):
            batch = source.at(step, micro_step)
            found |= dict(zip(batch.indices.tolist(), (batch.inputs * 255).round().byte(), strict=True))
    return found


@pytest.mark.parametrize("plan", [BatchPlan(6, 1, 2), BatchPlan(2, 2, 3)], ids=["two", "three-micro"])
@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_equal_for_any_division(plan: BatchPlan, workers: int, images: ImageSet) -> None:
    for step in (0, 3):  # two steps per epoch
        whole, divided = made(images, WHOLE, step), made(images, plan, step, num_workers=workers)
        assert whole.keys() == divided.keys()
        assert all(torch.equal(whole[index], divided[index]) for index in whole)
        assert not any(torch.equal(whole[index], images.images[index]) for index in whole)


def test_images_differ_from_epoch_to_epoch(images: ImageSet) -> None:
    first, later = made(images, WHOLE, 0), made(images, WHOLE, 2) | made(images, WHOLE, 3)
    both = first.keys() & later.keys()
    assert len(both) >= 6
    assert not any(torch.equal(first[index], later[index]) for index in both)


@pytest.mark.parametrize("held_out", [0, 4])
def test_crop_is_taken_from_the_whole_picture_of_the_file(held_out: int, folder: Path) -> None:
    """With the generator seeded from (seed, epoch, index), on the picture as it is in the file."""
    import_torchvision()
    crop = import_module("torchvision.transforms.v2").RandomResizedCrop([10, 10])
    whole = ImageFolder(folder / "train", 10, "pil")
    kept = torch.arange(held_out, 16)
    found = made(subset_of(whole, kept) if held_out else whole, WHOLE, 0, transforms=["RandomResizedCrop"])
    for index, image in found.items():
        picture = torch.from_numpy(np.array(Image.open(whole.paths[int(kept[index])]))).permute(2, 0, 1)
        with seeded(derive_seed(5, "example", 0, index)):
            assert torch.equal(image, crop(picture))


def test_pictures_are_resized_after_transforms_that_do_not(folder: Path) -> None:
    found = made(ImageFolder(folder / "train", 10, "pil"), WHOLE, 0, transforms=["RandomVerticalFlip"])
    whole = ImageFolder(folder / "train", 10, "pil")
    flipped = [torch.equal(image, whole[index][0].flip(-2)) for index, image in found.items()]
    assert all(same or torch.equal(found[index], whole[index][0]) for same, index in zip(flipped, found, strict=True))
    assert 0 < sum(flipped) < 12


def test_only_training_images_are_transformed(folder: Path) -> None:
    """The folder stays on the disk; validation and the evaluation of the training set see the pictures themselves."""
    settings = {"name": "image_folder", "root": str(folder), "image_size": 10, "transforms": NAMED}
    splits = load_splits(DataConfig.model_validate(settings), seed=0)
    assert isinstance(splits.train, ImageFolder)
    assert splits.train.transforms is None
    assert isinstance(splits.val, ImageFolder)
    assert splits.val.transforms is None


@pytest.mark.parametrize("name", TRANSFORMS)
def test_each_name_makes_an_image_of_an_image(name: str, images: ImageSet) -> None:
    arguments = REQUIRED.get(name, {})
    transforms = PictureTransforms([{name: arguments}], [12, 12])
    for image in (images.images[0], images.images[0, :1]):
        assert transforms(image).dtype == torch.uint8


@pytest.mark.parametrize(
    ("named", "words"),
    [
        (["RandAugmet"], r"data\.transforms\.0=RandAugmet: .* Did you mean RandAugment\?"),
        (["zzz"], r"Some of them: RandAugment"),
        ([{"RandAugment": {}, "AugMix": {}}], r"write a name, such as RandAugment, or one with arguments"),
        ([{"RandAugment": {"number": 2}}], r"RandAugment does not take {'number': 2}.* Its arguments: num_ops, magni"),
        ([{"RandAugment": 0}], r"data\.transforms\.0\.RandAugment=0: input should be a valid dictionary"),
        (["RandomRotation"], r"RandomRotation does not take no arguments: .*degrees"),
    ],
)
def test_mistake_is_one_line_before_the_start(named: list[Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load_splits(parse_config({"data": {"transforms": named}}).data, seed=0)
    assert "\n" not in str(caught.value)


def test_images_of_another_size_or_type_are_refused(images: ImageSet) -> None:
    with pytest.raises(ConfigError, match=r"make uint8 \[3, 16, 16\] of uint8 \[3, 12, 12\]\. End them with"):
        made(images, WHOLE, 0, transforms=[{"Pad": {"padding": 2}}])
    with pytest.raises(ConfigError, match=r"make uint8 \[3, 9, 9\] of uint8 \[3, 12, 12\]"):
        made(images, WHOLE, 0, transforms=[{"RandomCrop": {"size": 9}}])
    assert made(images, WHOLE, 0, transforms=[{"Pad": {"padding": 2}}, "RandomCrop"])


def test_transform_that_fails_is_named(images: ImageSet) -> None:
    with pytest.raises(
        ConfigError, match=r"ElasticTransform fails on uint8 \[3, 12, 12\]: .* Change its arguments, or"
    ):
        made(images, WHOLE, 0, transforms=["ElasticTransform"])


def test_transforms_and_resident_set_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.resident=true keeps images on the device as they are"):
        load_splits(DataConfig.model_validate({"transforms": NAMED, "resident": True}), seed=0)
