"""The net of a run's checkpoint without its data set, for prediction and export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.checkpoints.saved_net import SavedNet
from dist_train.config.schema import Config
from dist_train.data.transforms import Pixels
from dist_train.distributed.devices import default_dtype
from dist_train.errors import DataError, UserCodeError

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class TrainedNet:
    """A net in eval mode on the CPU, with its input and output formats."""

    config: Config
    folder: Path  # its checkpoint
    net: nn.Module
    in_channels: int
    image_size: int
    classes: tuple[str, ...] | None

    @classmethod
    def open(cls, path: Path, which: str) -> TrainedNet:
        """Load checkpoint `which` (last, best or a step) of a run.

        Raises:
            CheckpointError: the run or checkpoint does not exist.
            DataError: the net was not trained on square images of a known size.
        """
        saved = SavedNet.find(path, which)
        config, data = saved.config, saved.data
        if not data["pixels"] or data["in_channels"] not in (1, 3) or not data["image_size"]:
            raise DataError(
                f"{path} was trained on {config.data.bundle or config.data.name}, whose inputs are not pixels "
                f"or not square images. Only nets for square images with 1 or 3 channels can be used without the data."
            )
        classes = tuple(data["classes"]) if data["classes"] else None
        return cls(config, saved.folder, saved.build(), data["in_channels"], data["image_size"], classes)

    @property
    def on_pixels(self) -> nn.Module:
        """The net with its normalisation, for uint8 images [B, C, S, S]."""
        with default_dtype(self.config):
            return _OnPixels(self.net, Pixels(self.config.data.normalize, _CPU)).eval()


@torch.no_grad()
def logits_of(saved: TrainedNet, pixels: Tensor) -> Tensor:
    """Return the net's logits, of a regression its numbers, [B, K] for uint8 images [B, C, S, S].

    Raises:
        UserCodeError: the net does not return them.
    """
    output: Any = saved.on_pixels(pixels)
    if saved.config.task != "classification" and isinstance(output, Tensor) and output.ndim in (1, 2):
        return output.view(len(output), -1)
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[1] < 2:
        raise UserCodeError(f"{type(saved.net).__name__} does not return logits [B, K > 1], so it is not a classifier.")
    return output


class _OnPixels(nn.Module):
    scale: Tensor
    shift: Tensor

    def __init__(self, net: nn.Module, pixels: Pixels) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("scale", pixels.scale)
        self.register_buffer("shift", pixels.shift)

    def forward(self, images: Tensor) -> Any:
        return self.net(images.to(self.scale.dtype) * self.scale - self.shift)
