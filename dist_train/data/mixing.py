"""Mixup and cutmix: training images mixed with others of the same global batch, and the targets of such images."""

from __future__ import annotations

from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_train.config.augment import AugmentConfig
from dist_train.data.sampler import ShardSampler
from dist_train.data.sets.image_set import describe_value
from dist_train.distributed.rng import derive_seed
from dist_train.errors import ConfigError


class Mixed(NamedTuple):
    """The targets of mixed images: the labels of the images themselves, and of those mixed in."""

    labels: Tensor  # [B]
    others: Tensor  # [B]
    share: Tensor  # of `labels` in the target, []

    @property
    def larger(self) -> Tensor:
        """The label of each image with the larger share, [B]."""
        return torch.where(self.share >= 0.5, self.labels, self.others)


class Mixing:
    """Mixes each image with the one before it in the global batch, whichever rank and micro-batch has that one.

    With mixup all of the image is the weighted mean of both, with cutmix a rectangle comes from the other image. All
    images of a step are mixed in the same way, which is a function of (seed, step).
    """

    def __init__(self, config: AugmentConfig, sampler: ShardSampler, device: torch.device) -> None:
        """
        Raises:
            ConfigError: there is no other image in a global batch.
        """
        self._mixup, self._cutmix = config.mixup_alpha, config.cutmix_alpha
        self._seed, self._device = sampler.run_seed, device
        size, micro_steps = sampler.plan.global_batch_size, range(sampler.plan.grad_accum_steps)
        if size == 1:
            raise ConfigError(
                "global_batch_size=1 leaves no other image to mix an image with. Set it to 2 or more, or remove "
                "data.augment.mixup_alpha and data.augment.cutmix_alpha."
            )
        places = [_places(size, sampler.positions(micro_step)) for micro_step in micro_steps]
        # Positions in the global batch of the images that each micro-batch is made of, [M]: its own B, and others.
        self.positions = [positions for positions, _ in places]
        self._others = [others.to(device) for _, others in places]

    def draw(self, step: int, micro_step: int) -> tuple[Tensor, Tensor]:
        """Return what determines how a micro-batch is mixed: which of its M images are mixed in, int64 [B], and [4]:
        row and column of the centre of a rectangle, its half side and the weight in it, where the image's sides are 1.
        """
        random = Random(derive_seed(self._seed, "mix", step))
        cuts = bool(self._cutmix) and (not self._mixup or random.random() < 0.5)
        alpha = self._cutmix if cuts else self._mixup
        weight = random.betavariate(alpha, alpha)
        row, column = random.random(), random.random()
        drawn = [row, column, 0.5 * weight**0.5, 1.0] if cuts else [row, column, 1.0, weight]
        return self._others[micro_step], torch.tensor(drawn).to(self._device, non_blocking=True)

    def __call__(self, images: Tensor, labels: Any, others: Tensor, drawn: Tensor) -> tuple[Tensor, Mixed]:
        """Mix float images [M, C, H, W] with labels [M] to B of them.

        Raises:
            ConfigError: the labels are no tensor.
        """
        if not isinstance(labels, Tensor):
            raise ConfigError(
                f"data.augment.mixup_alpha and cutmix_alpha mix labels, and the targets are {describe_value(labels)}. "
                f"Remove them."
            )
        row, column, half, weight = drawn
        height, width = images.shape[2:]
        inside = _between(height, row, half)[:, None] & _between(width, column, half)
        weights = inside * weight  # of the other image at each pixel, [H, W]
        mixed = images[: len(others)].lerp(images.index_select(0, others), weights)
        targets = Mixed(labels[: len(others)], labels.index_select(0, others), 1 - weights.mean())
        return mixed, targets


def _places(size: int, own: slice) -> tuple[Tensor, Tensor]:
    """Return the positions [M] of a micro-batch's images, and which of these are mixed into its own B, [B]."""
    positions = torch.arange(size)[own]
    wanted = (positions - 1) % size
    positions = torch.cat([positions, wanted[~torch.isin(wanted, positions)]])
    row_of = torch.empty(size, dtype=torch.int64)
    row_of[positions] = torch.arange(len(positions))
    return positions, row_of[wanted]


def _between(pixels: int, centre: Tensor, half: Tensor) -> Tensor:
    """Return which rows or columns are within `half` of the centre, both rounded down to pixels: bool [pixels]."""
    middle, reach = (centre * pixels).long(), (half * pixels).long()
    numbers = torch.arange(pixels, device=centre.device)
    return (numbers >= middle - reach) & (numbers < middle + reach)
