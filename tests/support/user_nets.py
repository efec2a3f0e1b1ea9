"""User nets and a data set with unusual features."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_train.data.sets.image_set import ImageSet
from dist_train.distributed import launcher_watch
from dist_train.models.nets import Bks, Mlp
from support.user_sets import mnist_part

OPEN = "open"
READY = "ready"


class Drawing(Mlp):
    """Draws from all three generators in training."""

    def forward(self, images: Tensor) -> Tensor:
        noise = random.random() + float(np.random.rand()) + torch.rand(())
        return super().forward(images * (1 + noise) if self.training else images)


class _Held:
    """Each training step takes `slow_s` longer until OPEN exists in the current folder; results do not change.

    A run to be disturbed must not end before that on a fast machine, and must not be slow afterwards. It is held from
    the first step on: the step rate sets the interval at which ranks agree, so that ranks which slow down suddenly
    would notice a signal late.
    """

    training: bool

    def __init__(self, slow_s: float = 0.1) -> None:
        super().__init__()
        self.slow_s, self.calls, self.held = slow_s, 0, True

    def hold(self) -> None:
        self.calls += self.training
        if self.training and self.held:
            self.held = not Path(OPEN).exists()
            time.sleep(self.slow_s if self.held else 0.0)


class Gated(_Held, Mlp):
    def forward(self, images: Tensor) -> Tensor:
        self.hold()
        return super().forward(images)


class GatedInSetUp(Gated):
    """Its first call, which is in the set-up, lasts until READY exists in the current folder."""

    def forward(self, images: Tensor) -> Tensor:
        while not Path(READY).exists():
            time.sleep(0.05)
        return super().forward(images)


class GatedBks(_Held, Bks):
    """A gated net with convolutions and dropout."""

    def forward(self, images: Tensor) -> Tensor:
        self.hold()
        return super().forward(images)


class KilledInSetUp(Mlp):
    """Its process is killed at the first call, which is in the set-up."""

    def forward(self, images: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images)


class LongOrphanGrace(Mlp):
    """Has a minute, not 3 s, to save and end after its launcher died, for busy machines."""

    def __init__(self) -> None:
        super().__init__()
        launcher_watch.ORPHAN_GRACE_S = 60.0


class Masked(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))


class Projecting(Mlp):
    """Draws in its constructor what no checkpoint holds: the seed has to draw it again."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(()), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(self.scale * images)


class OwnLoss(Mlp):
    """Has a loss with its own weights and another value in training."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(10, 10)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(output), target) + (1.0 if self.training else 0.0)


class Shifting(Mlp):
    """Has a loss for labels that start at 1, which it changes in place."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target.sub_(1))


class Scoring(Mlp):
    """Not a classifier by the shape of its output; its `accuracy` is undefined in its first and third evaluation.

    Its loss is negative: as a score it would beat any accuracy.
    """

    def __init__(self) -> None:
        super().__init__()
        self.evaluations = 0

    def train(self, mode: bool = True) -> Scoring:
        self.evaluations += self.training and not mode
        return super().train(mode)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)[:, :, None]

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target[:, None]) - 9

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, float]:
        undefined = float("nan")
        return {"accuracy": undefined if self.evaluations in (1, 3) else 1 / self.evaluations, "recall": undefined}


class Encoding(nn.Module):
    """An autoencoder with a code of two numbers; needs no targets."""

    def __init__(self) -> None:
        super().__init__()
        self.within, self.out = nn.Linear(64, 2), nn.Linear(2, 64)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images.flatten(1), self.out(self.within(images.flatten(1)))

    def loss(self, output: tuple[Tensor, Tensor], _target: None) -> Tensor:
        return nn.functional.mse_loss(*output)


class ForOdd(nn.Module):
    """Accepts batches of `user_sets.Odd`; with `in_place` it and its loss change their inputs in place."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, inputs: Any) -> Tensor:
        image = inputs
        if not isinstance(inputs, Tensor):
            image, mask = inputs.values() if isinstance(inputs, dict) else inputs
            image = image * mask
        logits: Tensor = self.layers(image.mul_(0.9) if self.in_place else image)
        return logits

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, (target.add_(1) if self.in_place else target + 1) - 1)


class Frozen(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


class Extra(Mlp):
    def get_extra_state(self) -> dict[str, int]:
        return {"a": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


class _AtCall(_Held, Mlp):
    """Acts in one training call on one rank."""

    def __init__(self, call: int, rank: int, slow_s: float = 0.0) -> None:
        super().__init__(slow_s)
        self.call, self.rank = call, str(rank)

    def is_due(self) -> bool:
        self.hold()
        return self.calls == self.call and os.environ.get("RANK", "0") == self.rank


class Failing(_AtCall):
    """Writes to stdout from a subprocess in its first call and fails in call number `call`."""

    def forward(self, images: Tensor) -> Tensor:
        if self.calls == 0:
            os.system("echo hello from rank $RANK")
        if self.is_due():
            raise ValueError("no such digit")
        return super().forward(images)


class Hanging(_AtCall):
    """Hangs in call number `call`, in C code that holds the GIL."""

    def forward(self, images: Tensor) -> Tensor:
        due = self.is_due()
        while due:
            ctypes.PyDLL(None).sleep(1000)
        return super().forward(images)


def negative(train: bool) -> ImageSet:
    found = mnist_part(train)
    found.labels[3] = -100
    return found


class Normed(nn.Module):
    """A net of small images with a BatchNorm layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.second(self.norm(self.first(images.flatten(1))).relu())
        return logits


class Spare(Normed):
    """Has a layer that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)
