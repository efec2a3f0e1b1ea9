"""The settings of random changes of training images."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    JsonValue,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    model_validator,
)

from dist_train.config.section import Section
from dist_train.errors import did_you_mean

# The classes of torchvision.transforms.v2 that make an image of one image.
TRANSFORMS = (
    "AugMix", "AutoAugment", "CenterCrop", "ColorJitter", "ElasticTransform", "GaussianBlur", "GaussianNoise", "Pad",
    "RandAugment", "RandomAdjustSharpness", "RandomAffine", "RandomAutocontrast", "RandomChannelPermutation",
    "RandomCrop", "RandomEqualize", "RandomErasing", "RandomGrayscale", "RandomHorizontalFlip", "RandomInvert",
    "RandomPerspective", "RandomPhotometricDistort", "RandomPosterize", "RandomResizedCrop", "RandomRotation",
    "RandomSolarize", "RandomVerticalFlip", "Resize", "TrivialAugmentWide",
)  # fmt: skip


def _with_arguments(entry: object) -> object:
    """Return {NAME: arguments} for a NAME alone too."""
    named = {entry: {}} if isinstance(entry, str) else entry
    if not isinstance(named, dict) or len(named) != 1:
        raise ValueError("write a name, such as RandAugment, or one with arguments, {RandAugment: {magnitude: 5}}")
    [(name, arguments)] = named.items()
    if name not in TRANSFORMS:
        meant = did_you_mean(str(name), TRANSFORMS) or " Some of them: RandAugment, AugMix, RandomResizedCrop"
        raise ValueError(f"torchvision has no transform {name} of one image.{meant}")
    return {name: {} if arguments is None else arguments}


NamedTransform = Annotated[dict[str, dict[str, JsonValue]], BeforeValidator(_with_arguments)]


def _rising(pair: tuple[float, float]) -> tuple[float, float]:
    low, high = pair
    if low > high:
        raise ValueError(f"the smaller one comes first: [{high:g}, {low:g}]")
    return pair


def _share(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[1] > 1:
        raise ValueError(f"a part of an image has at most its area, which is 1, not {pair[1]:g}")
    return pair


_Range = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_rising)]


class AugmentConfig(Section):
    """Random changes of training images, drawn for each example at each step and applied on the device."""

    shift: NonNegativeInt = 0  # shift by up to this many pixels in each direction
    # What fills the gap of a shift: constant is black, reflect mirrors the image at its edge.
    padding_mode: Literal["constant", "reflect"] = "constant"
    # Instead of `shift`, torchvision's RandomResizedCrop: the share of the image's area that is cut out and resized to
    # the whole, such as [0.35, 1].
    scale: Annotated[_Range, AfterValidator(_share)] | None = None
    ratio: _Range = (0.75, 4 / 3)  # for scale: width / height of the part, where that of the image counts as 1
    # Mirror left and right: true with probability 0.5; alternate in every other epoch, random in the first.
    flip: Literal[False, True, "alternate"] = False
    # As torchvision's ColorJitter, but always in the order brightness, contrast, saturation: multiply by a factor that
    # is drawn from 1 - brightness (at least 0) to 1 + brightness.
    brightness: NonNegativeFloat = 0.0
    contrast: NonNegativeFloat = 0.0  # likewise the differences from the mean grey of the image
    saturation: NonNegativeFloat = 0.0  # likewise the differences from the grey of each pixel
    cutout: NonNegativeInt = 0  # black out a square of this many pixels per side around a random pixel of the image
    # Mix each image, and its label, with another one of the global batch, by a weight that each step draws from
    # Beta(mixup_alpha, mixup_alpha), such as 0.2. With cutmix_alpha too, each step does one of the two. 0: never.
    mixup_alpha: NonNegativeFloat = 0.0
    # Likewise, but a rectangle comes from the other image; its area is drawn from Beta(cutmix_alpha, cutmix_alpha),
    # such as 1. 0: never.
    cutmix_alpha: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _fits(self) -> AugmentConfig:
        if self.shift and self.scale:
            raise ValueError(f"shift={self.shift} and scale={list(self.scale)} both choose a part; keep one of them")
        return self

    @property
    def mixes(self) -> bool:
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0
