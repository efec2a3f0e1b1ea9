"""Transforms of uint8 images on their device: random shifts and flips, normalisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dist_train.config.batch_plan import BatchPlan
from dist_train.config.schema import AugmentConfig, Normalize
from dist_train.distributed.rng import derive_seed


class Pixels:
    """Converts uint8 pixels to normalised floats, (x / 255 - mean) / std, on their device."""

    def __init__(self, normalize: Normalize | None, device: torch.device) -> None:
        dtype = torch.get_default_dtype()
        mean = torch.tensor(normalize.mean if normalize else [0.0], dtype=torch.float64)
        std = torch.tensor(normalize.std if normalize else [1.0], dtype=torch.float64)
        # One multiplication and one subtraction take a third less memory traffic than the formula as written.
        self.scale = (1 / (255 * std)).to(dtype).view(-1, 1, 1).to(device)
        self.shift = (mean / std).to(dtype).view(-1, 1, 1).to(device)
        self.is_identity = not self.shift.any().item()

    def __call__(self, pixels: Tensor) -> Tensor:  # uint8 [B, C, H, W] -> float [B, C, H, W]
        images = pixels.to(self.scale.dtype).mul_(self.scale)
        return images if self.is_identity else images.sub_(self.shift)


def change_each(change: Callable[[Any], Any], value: Any) -> Any:
    """Apply `change` to every tensor, and every object with `.to`, in nested containers, whose types are kept."""
    if isinstance(value, Tensor) or hasattr(value, "to"):
        return change(value)
    if isinstance(value, (list, tuple)):
        items = [change_each(change, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)  # named tuple: positional
    if isinstance(value, Mapping):
        changed: Any = {key: change_each(change, item) for key, item in value.items()}
        if not isinstance(value, MutableMapping):
            return type(value)(changed)  # type: ignore[call-arg]
        value = copy(value)  # it may have state besides its items, as a defaultdict
        value.update(changed)
    return value


def to_default_dtype(inputs: Any) -> Any:
    """Convert float32 tensors from user code to the run's dtype (float64 is for exactness checks)."""
    dtype = torch.get_default_dtype()
    if dtype == torch.float32:
        return inputs
    return change_each(lambda item: item.to(dtype) if getattr(item, "dtype", None) == torch.float32 else item, inputs)


class Augment:
    """Random shifts and flips of uint8 images, drawn for each example of each step.

    They are drawn for the whole global batch as a function of (seed, step), and each rank takes its rows: the images
    are the same for any world size, any division into micro-batches, and after any resume.
    """

    def __init__(self, config: AugmentConfig, plan: BatchPlan, rank: int, seed: int, device: torch.device) -> None:
        self.shift, self.flip = config.shift, config.flip
        self._plan, self._rank, self._seed, self._device = plan, rank, seed, device

    def draw(self, step: int, micro_step: int) -> tuple[Tensor, Tensor]:
        """Draw a micro-batch's corners of the shifted images in the padded ones, int64 [B, 2], and flips, bool [B]."""
        plan = self._plan
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "augment", step))
        corners = torch.randint(2 * self.shift + 1, (plan.global_batch_size, 2), generator=generator)
        flips = torch.rand(plan.global_batch_size, generator=generator) < (0.5 if self.flip else 0.0)
        start = micro_step * plan.per_device_batch_size
        rows = slice(start, start + plan.per_device_batch_size)
        corners, flips = corners[self._rank :: plan.world_size][rows], flips[self._rank :: plan.world_size][rows]
        return corners.to(self._device, non_blocking=True), flips.to(self._device, non_blocking=True)

    def __call__(self, images: Tensor, corners: Tensor, flips: Tensor) -> Tensor:
        """Shift and flip uint8 [B, C, H, W]; pixels from outside the image are black."""
        if self.shift:
            height, width = images.shape[2:]
            padded = pad(images, [self.shift] * 4)
            windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view [B, C, 2 s + 1, 2 s + 1, H, W]
            rows = torch.arange(len(images), device=images.device)
            images = windows[rows, :, corners[:, 0], corners[:, 1]]
        if self.flip:
            images = torch.where(flips[:, None, None, None], images.flip(-1), images)
        return images
