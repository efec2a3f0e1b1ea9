"""Random changes of training images on their device: parts, mirrored images, colours, black squares, mixtures."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Generator, Tensor
from torch.nn.functional import grid_sample, pad

from dist_train.config.augment import AugmentConfig
from dist_train.data.mixing import Mixing
from dist_train.data.sampler import ShardSampler
from dist_train.data.transforms import Pixels
from dist_train.distributed.rng import derive_seed

_GREY = (0.2989, 0.587, 0.114)  # of red, green and blue, as in torchvision


class Augment:
    """Makes inputs and targets of uint8 images and labels, with random changes drawn for each example of each step.

    They are drawn for the whole global batch as a function of (seed, step), and each rank takes its rows: the images
    are the same for any world size, any division into micro-batches, and after any resume.
    """

    def __init__(self, config: AugmentConfig, sampler: ShardSampler, pixels: Pixels, device: torch.device) -> None:
        self._sampler, self._pixels, self._device = sampler, pixels, device
        self._mixing = Mixing(config, sampler, device) if config.mixes else None
        # Each draws from where the one before has stopped: a new one goes to the end, as old runs are resumed.
        self._changes: list[_Change] = [
            _ResizedCrop(config.scale, config.ratio) if config.scale else _Shift(config.shift, config.padding_mode)
        ]
        if config.flip:
            self._changes.append(_AlternatingFlip(sampler) if config.flip == "alternate" else _Flip())
        if config.brightness or config.contrast or config.saturation:
            self._changes.append(_Colours(config.brightness, config.contrast, config.saturation))
        if config.cutout:
            self._changes.append(_Cutout(config.cutout))

    def positions(self, micro_step: int) -> slice | Tensor:
        """Return where in the global batch the M images are that a micro-batch is made of, its own B first."""
        return self._sampler.positions(micro_step) if self._mixing is None else self._mixing.positions[micro_step]

    def draw(self, step: int, micro_step: int) -> tuple[Tensor, ...]:
        """Draw what determines the changes of a micro-batch: tensors on the device, one for each change and those of
        `Mixing.draw`."""
        generator = Generator().manual_seed(derive_seed(self._sampler.run_seed, "augment", step))
        size, positions = self._sampler.plan.global_batch_size, self.positions(micro_step)
        drawn = [change.draw(size, generator, step)[positions] for change in self._changes]
        mixed = () if self._mixing is None else self._mixing.draw(step, micro_step)
        return (*(each.to(self._device, non_blocking=True) for each in drawn), *mixed)

    def __call__(self, images: Tensor, labels: Any, *drawn: Tensor) -> tuple[Tensor, Any]:
        """Return inputs [B, C, H, W] and targets [B] of uint8 images [M, C, H, W] and labels [M]."""
        mixed = drawn[len(self._changes) :]
        for change, each in zip(self._changes, drawn[: len(self._changes)], strict=True):
            images = change(images, each)
        inputs = self._pixels(images)
        return (inputs, labels) if self._mixing is None else self._mixing(inputs, labels, *mixed)


class _Change(Protocol):
    def draw(self, size: int, generator: Generator, step: int) -> Tensor:
        """Draw for the global batch of this many examples: [size, ...] on the host."""

    def __call__(self, images: Tensor, drawn: Tensor, /) -> Tensor:
        """Change [B, C, H, W] of pixels from 0 to 255, uint8 or in the default dtype; returns one of both."""


class _Shift:
    """Draws the corners of the shifted images in the padded ones, int64 [B, 2]."""

    def __init__(self, by: int, padding_mode: str) -> None:
        self._by, self._padding_mode = by, padding_mode

    def draw(self, size: int, generator: Generator, step: int) -> Tensor:
        return torch.randint(2 * self._by + 1, (size, 2), generator=generator)

    def __call__(self, images: Tensor, corners: Tensor) -> Tensor:
        if not self._by:
            return images
        height, width = images.shape[2:]
        padded = pad(images, [self._by] * 4, self._padding_mode)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view [B, C, 2 by + 1, 2 by + 1, H, W]
        rows = torch.arange(len(images), device=images.device)
        return windows[rows, :, corners[:, 0], corners[:, 1]]


class _ResizedCrop:
    """Draws parts of the image, [B, 4]: top, left, height and width, where those of the image are 1."""

    _TRIES = 10  # as in torchvision

    def __init__(self, scale: tuple[float, float], ratio: tuple[float, float]) -> None:
        self._scale, self._ratio = scale, ratio

    def draw(self, size: int, generator: Generator, step: int) -> Tensor:
        low, high = map(math.log, self._ratio)
        areas, ratios, *places = torch.rand(4, size, self._TRIES, generator=generator)
        areas = self._scale[0] + (self._scale[1] - self._scale[0]) * areas
        ratios = (low + (high - low) * ratios).exp()
        sides = torch.stack([(areas / ratios).sqrt(), (areas * ratios).sqrt()], dim=-1)  # [size, tries, 2]
        corners = (1 - sides) * torch.stack(places, dim=-1)
        fits = (sides <= 1).all(dim=-1)
        first = fits.int().argmax(dim=1)  # the first that fits
        parts = torch.cat([corners, sides], dim=-1)[torch.arange(size), first]
        return torch.where(fits.any(dim=1, keepdim=True), parts, self._centre())

    def _centre(self) -> Tensor:
        """Return the largest part in the centre whose ratio is allowed."""
        sides = torch.tensor([min(1.0, 1 / self._ratio[0]), min(1.0, self._ratio[1])])
        return torch.cat([(1 - sides) / 2, sides])

    def __call__(self, images: Tensor, parts: Tensor) -> Tensor:
        top, left, height, width = parts.unsqueeze(-1).unbind(dim=1)  # each [B, 1]
        rows, columns = _centres(images.shape[2], top, height), _centres(images.shape[3], left, width)
        rows, columns = torch.broadcast_tensors(rows[:, :, None], columns[:, None, :])
        grid = torch.stack([columns, rows], dim=-1)  # [B, H, W, 2], from -1 to 1
        return grid_sample(images.to(grid.dtype), grid, padding_mode="border", align_corners=False)


def _centres(pixels: int, start: Tensor, length: Tensor) -> Tensor:
    """Return where the centres of this many pixels are read in the image, from -1 to 1: [B, pixels].

    Those next to an edge of the part are read half a pixel of the image inside it, not across the edge.
    """
    half = 0.5 / pixels
    within = (torch.arange(pixels, device=start.device, dtype=start.dtype) / pixels + half) * length
    return 2 * (start + within.clamp(min=half).minimum(length - half)) - 1


class _Flip:
    """Draws which images are mirrored left and right, bool [B]."""

    def draw(self, size: int, generator: Generator, step: int) -> Tensor:
        return torch.rand(size, generator=generator) < 0.5

    def __call__(self, images: Tensor, flips: Tensor) -> Tensor:
        return torch.where(flips[:, None, None, None], images.flip(-1), images)


class _AlternatingFlip(_Flip):
    """Mirrors an example in every other epoch; whether in the first is a function of (seed, example)."""

    def __init__(self, sampler: ShardSampler) -> None:
        self._sampler = sampler
        generator = Generator().manual_seed(derive_seed(sampler.run_seed, "flip"))
        self._first = torch.rand(sampler.num_examples, generator=generator) < 0.5

    def draw(self, size: int, generator: Generator, step: int) -> Tensor:
        is_odd = step // self._sampler.steps_per_epoch % 2 == 1
        return self._first[self._sampler.batch(step)] ^ is_odd


class _Colours:
    """Draws the factors of brightness, contrast and saturation, [B, 3]."""

    def __init__(self, *strengths: float) -> None:
        self._strengths = strengths

    def draw(self, size: int, generator: Generator, step: int) -> Tensor:
        strengths = torch.tensor(self._strengths)
        low = (1 - strengths).clamp(min=0)
        return low + (1 + strengths - low) * torch.rand(size, 3, generator=generator)

    def __call__(self, images: Tensor, factors: Tensor) -> Tensor:
        images = images.to(factors.dtype)
        for strength, reference, column in zip(self._strengths, (_black, _mean_grey, _grey), factors.T, strict=True):
            if strength:
                origin = reference(images)
                images = (origin + column[:, None, None, None] * (images - origin)).clamp(0, 255)
        return images


def _black(images: Tensor) -> Tensor:
    return torch.zeros_like(images[:1, :1, :1, :1])


def _grey(images: Tensor) -> Tensor:
    """Return the grey of each pixel, [B, 1, H, W]."""
    if images.shape[1] != 3:
        return images.mean(dim=1, keepdim=True)
    red, green, blue = images.split(1, dim=1)
    grey: Tensor = _GREY[0] * red + _GREY[1] * green + _GREY[2] * blue
    return grey


def _mean_grey(images: Tensor) -> Tensor:
    return _grey(images).mean(dim=(2, 3), keepdim=True)


class _Cutout:
    """Draws the centres of the squares, [B, 2], where the sides of the image are 1."""

    def __init__(self, side: int) -> None:
        self._side = side

    def draw(self, size: int, generator: Generator, step: int) -> Tensor:
        return torch.rand(size, 2, generator=generator)

    def __call__(self, images: Tensor, centres: Tensor) -> Tensor:
        rows, columns = (
            self._inside(pixels, centre) for pixels, centre in zip(images.shape[2:], centres.T, strict=True)
        )
        return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)

    def _inside(self, pixels: int, centre: Tensor) -> Tensor:
        """Return which rows or columns are in the square: bool [B, pixels]."""
        first = (centre * pixels).long()[:, None] - self._side // 2
        numbers = torch.arange(pixels, device=centre.device)
        return (numbers >= first) & (numbers < first + self._side)
