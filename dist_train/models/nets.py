"""The nets of the five tutorials, with the same weights, and nets for fast training.

Shapes: images [B, C, S, S] -> logits [B, K], with C = in_channels, S = image_size, K = num_classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.errors import ConfigError
from dist_train.models.names import NETS


class Mlp(nn.Module):
    """One hidden layer of 50 units: 39 760 weights on MNIST."""

    def __init__(self, in_channels: int = 1, num_classes: int = 10, image_size: int = 28, hidden: int = 50) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_channels * image_size**2, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc2(F.relu(self.fc1(images.flatten(1))))  # [B, K]
        return logits


class Guide(Mlp):
    """The net of the guide with 28 hidden units: 22 270 weights on MNIST.

    The guide's code does not run as printed. Fixed here: `Linear(28, 28)` was applied to each image row, so its output
    did not match the labels (now the image is flattened first); `optim` was not imported, the model was never
    constructed, and `loss.backwards()` is spelled `backward()`.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10, image_size: int = 28, hidden: int = 28) -> None:
        super().__init__(in_channels, num_classes, image_size, hidden)


class Bks(nn.Module):
    """The net of BK.Synapse, two 5x5 convolutions and two linear layers: 21 840 weights on MNIST."""

    channels_last = True  # bks on two cores: 2.1x the samples per second; not for user code, which may rely on strides

    def __init__(self, in_channels: int = 1, num_classes: int = 10, image_size: int = 28, dropout: float = 0.5) -> None:
        super().__init__()
        side = _side("bks", image_size, lambda size: ((size - 4) // 2 - 4) // 2)
        self.conv1 = nn.Conv2d(in_channels, 10, kernel_size=5)
        self.conv2 = nn.Conv2d(10, 20, kernel_size=5)
        self.conv2_drop = nn.Dropout2d(dropout)
        self.fc1 = nn.Linear(20 * side**2, 50)
        self.fc2 = nn.Linear(50, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv1(images), 2))
        x = F.relu(F.max_pool2d(self.conv2_drop(self.conv2(x)), 2))
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.dropout(x, self.conv2_drop.p, self.training)
        logits: Tensor = self.fc2(x)  # [B, K]
        return logits


class Conv(nn.Module):
    """Three 3x3 convolutions, three linear layers: 181 276 weights on MNIST."""

    channels_last = True  # bks on two cores: 2.1x the samples per second; not for user code, which may rely on strides

    def __init__(
        self, in_channels: int = 1, num_classes: int = 10, image_size: int = 28, num_filters: int = 32
    ) -> None:
        super().__init__()
        side = _side("conv", image_size, lambda size: size // 2 // 2)
        # The tutorial has ReLU before each pooling; this order gives the same values and gradients with less work.
        self.convs = nn.Sequential(
            nn.Conv2d(in_channels, num_filters, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(num_filters, num_filters, kernel_size=3, padding=1),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(num_filters, num_filters, kernel_size=3, padding=1),
            nn.MaxPool2d(2),
            nn.ReLU(),
        )
        self.linears = nn.Sequential(
            nn.Linear(num_filters * side**2, 100), nn.ReLU(), nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, num_classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linears(self.convs(images).flatten(1))  # [B, K]
        return logits


class Fast(nn.Module):
    """A net for more than 99 % on MNIST in seconds on a CPU, independent of the world size: no BatchNorm or dropout."""

    channels_last = True  # bks on two cores: 2.1x the samples per second; not for user code, which may rely on strides

    def __init__(self, in_channels: int = 1, num_classes: int = 10, image_size: int = 28) -> None:
        super().__init__()
        side = _side("fast", image_size, lambda size: ((size - 4) // 2 - 2) // 2)
        self.conv1 = nn.Conv2d(in_channels, 16, kernel_size=5)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3)
        self.fc1 = nn.Linear(32 * side**2, 128)
        self.fc2 = nn.Linear(128, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv1(images), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        logits: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))  # [B, K]
        return logits


class Speedrun(nn.Module):
    """A net for 99 % on MNIST with as little arithmetic as possible: 370 thousand multiplications per image.

    Digits fill the middle 20 x 20 pixels, so the outer two pixels on each side are cropped. BatchNorm is needed to
    reach 99 % within one epoch.
    """

    channels_last = True

    def __init__(self, in_channels: int = 1, num_classes: int = 10, image_size: int = 28) -> None:
        super().__init__()
        side = _side("speedrun", image_size, lambda size: ((size - 4 - 5) // 2 + 1 - 2) // 2)
        self.conv1 = nn.Conv2d(in_channels, 16, kernel_size=5, stride=2, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, bias=False)
        self.norm2 = nn.BatchNorm2d(32)
        self.fc1 = nn.Linear(32 * side**2, 64, bias=False)
        self.norm3 = nn.BatchNorm1d(64)
        self.fc2 = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(images[:, :, 2:-2, 2:-2])))
        x = F.relu(self.norm2(F.max_pool2d(self.conv2(x), 2)))
        x = F.relu(self.norm3(self.fc1(x.flatten(1))))
        logits: Tensor = self.fc2(x)  # [B, K]
        return logits


MODELS: dict[str, type[nn.Module]] = dict(zip(NETS, (Mlp, Bks, Guide, Conv, Fast, Speedrun), strict=True))


def _side(name: str, image_size: int, side_of: Callable[[int], int]) -> int:
    """Return the side length after the last pooling, or raise ConfigError if it is 0."""
    if side_of(image_size) >= 1:
        return side_of(image_size)
    minimum = next(size for size in range(image_size, 100) if side_of(size) >= 1)
    raise ConfigError(f"model.name={name} needs image_size of at least {minimum}, not {image_size}.")
