"""Data sets and nets as a user writes them."""

from __future__ import annotations

import os
import random
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dist_train.config.paths import default_data_root
from dist_train.data.sets.image_set import ImageSet
from dist_train.data.sets.named_sets import load_named


def mnist_part(train: bool, length: int = 960) -> ImageSet:
    """Return the first images of MNIST, for real pixels and a fast evaluation."""
    whole = load_named("mnist", default_data_root(), None)[0 if train else 1]
    return whole.subset(torch.arange(length))


def noise(train: bool, size: int) -> ImageSet:
    """Return a dozen random images of `size` pixels per side in ten classes."""
    generator = torch.Generator().manual_seed(int(train))
    pixels = torch.randint(256, (12, 3, size, size), dtype=torch.uint8, generator=generator)
    return ImageSet(pixels, torch.randint(10, (12,), generator=generator), tuple("abcdefghij"))


class Jittered(Dataset[tuple[Tensor, int]]):
    """Small random images with a transform that draws from all three generators user code uses."""

    classes = ("a", "b", "c")

    def __init__(self, train: bool, length: int = 101) -> None:
        generator = torch.Generator().manual_seed(1 if train else 2)
        self.images = torch.rand(length, 1, 8, 8, generator=generator)
        self.labels = torch.randint(3, (length,), generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = 0.1 * torch.rand(1, 8, 8) + 0.1 * random.random() + 0.1 * float(np.random.rand())
        return self.images[index] + noise, int(self.labels[index])


class Still(Jittered):
    """The same images without a transform: float32, or as uint8 pixels with the label as a numpy number."""

    def __init__(self, train: bool, length: int = 101, yields_pixels: bool = False, slow_s: float = 0.0) -> None:
        super().__init__(train, length)
        self.yields_pixels, self.slow_s = yields_pixels, slow_s

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        time.sleep(self.slow_s)
        image, label = self.images[index], int(self.labels[index])
        return ((255 * image).to(torch.uint8), np.int64(label)) if self.yields_pixels else (image, label)


class Unlabelled(Jittered):
    """Has batches without targets, for a net that needs none."""

    def collate(self, batch: list[tuple[Tensor, int]]) -> tuple[Tensor, None]:
        return torch.stack([image for image, _ in batch]), None


Pair = namedtuple("Pair", "image mask")


class Odd(Dataset[Any]):
    """Has any length and structure and draws from any generators. With a `folder` its images are in a file there that
    is opened at the first use."""

    classes = ("a", "b", "c")

    def __init__(self, train: bool, length: int, form: str, draws: list[str], folder: str | None) -> None:
        self.length, self.form, self.draws = (length if train else 17), form, draws
        self.images = np.random.default_rng(int(train)).random((self.length, 1, 8, 8), dtype=np.float32)
        self.path = Path(folder, f"train={train}") if folder else None
        self.file: Any = None
        if self.path:
            self.path.write_bytes(self.images.tobytes())

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image = torch.from_numpy(self.read(index)) + 0.1 * sum(NOISE[name]() for name in self.draws)
        label = index % 3
        if self.form == "mapping":
            return {"image": image, "mask": image > 0.5}, label
        if self.form == "named tuple":
            return Pair(image, image > 0.5), label
        return (image.numpy(), np.int64(label)) if self.form == "array" else (image, torch.tensor(label))

    def read(self, index: int) -> Any:
        if self.path is None:
            return self.images[index].copy()
        self.file = self.file or self.path.open("rb", buffering=0)
        self.file.seek(index * 256)
        return np.frombuffer(self.file.read(256), dtype=np.float32).reshape(1, 8, 8).copy()


NOISE: dict[str, Callable[[], float]] = {
    "python": random.random,
    "numpy": lambda: float(np.random.rand()),
    "torch": lambda: float(torch.rand(())),
}


class FromOne(Jittered):
    """Has labels that start at 1."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = super().__getitem__(index)
        return image, label + 1


class Rare(Dataset[tuple[Tensor, str]]):
    """Three classes of 1800, 150 and 50 examples, their names in an attribute `targets`."""

    def __init__(self, train: bool) -> None:
        self.targets = ["common"] * 1800 + ["rare"] * 150 + ["rarer"] * 50

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        return torch.zeros(1, 2, 2), self.targets[index]


class OfLength(Jittered):
    """Takes its length from TEST_LENGTH, on ranks other than zero from TEST_LENGTH_ELSEWHERE."""

    def __init__(self, train: bool) -> None:
        name = "TEST_LENGTH_ELSEWHERE" if int(os.environ.get("RANK", 0)) else "TEST_LENGTH"
        super().__init__(train, int(os.environ.get(name, 101)))


class Lazy(Dataset[Any]):
    """Represents a file of records that is opened at the first use; other processes must not use the handle."""

    def __init__(self, train: bool) -> None:
        self.opened_by: int | None = None

    def __len__(self) -> int:
        self.open()
        return 50

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.open()
        return torch.full((1, 8, 8), index / 50), index % 2

    @property
    def classes(self) -> tuple[str, ...]:
        self.open()
        return "a", "b"

    def open(self) -> None:
        self.opened_by = self.opened_by or os.getpid()
        if self.opened_by != os.getpid():
            raise RuntimeError("this handle is another process's")


class Exits(Lazy):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        os._exit(3)


class Fails(Lazy):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        raise ValueError("no such record")


class Empty(Lazy):
    def __len__(self) -> int:
        return 0


class WithDropout(nn.Module):
    def __init__(self, in_channels: int = 1, num_classes: int = 3, hidden: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(64 * in_channels, hidden)
        self.drop = nn.Dropout(0.3)
        self.second = nn.Linear(hidden, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.second(self.drop(self.first(images.flatten(1)).relu()))
        return logits


class Slow(WithDropout):
    """Takes 50 ms longer."""

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(0.05)
        return super().forward(images)


class TwoDigits(Dataset[tuple[Tensor, Tensor]]):
    """Pictures with two digits of MNIST in them, and for each of the ten whether it is there."""

    classes = tuple("0123456789")
    yields_pixels = True

    def __init__(self, train: bool, length: int = 960) -> None:
        self.digits = mnist_part(train, length)

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pair = [index, (7 * index + 1) % len(self)]
        there = torch.zeros(10)
        there[self.digits.labels[pair]] = 1
        return self.digits.images[pair].amax(dim=0), there


class Tilted(Dataset[tuple[Tensor, float]]):
    """Digits of MNIST sheared by an amount from -1 to 1, which is the target."""

    yields_pixels = True

    def __init__(self, train: bool, length: int = 960) -> None:
        self.digits = mnist_part(train, length)
        self.amounts = torch.rand(length, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> tuple[Tensor, float]:
        image, amount = self.digits.images[index, 0], float(self.amounts[index])
        rows = [row.roll(round(amount * (14 - number) / 2)) for number, row in enumerate(image)]
        return torch.stack(rows).unsqueeze(0), amount
