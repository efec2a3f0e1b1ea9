"""Nets and a data set with what is unusual in user code."""

from __future__ import annotations

import ctypes
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_train.data.sets.image_set import ImageSet
from dist_train.distributed import parent
from dist_train.models.nets import Bks, Mlp
from support.user_sets import mnist_part

OPEN = "open"


class Drawing(Mlp):
    """From all three generators."""

    def forward(self, images: Tensor) -> Tensor:
        noise = random.random() + float(np.random.rand()) + torch.rand(())
        return super().forward(images * (1 + noise) if self.training else images)


class _Held:
    """Each step of training takes `slow_s` longer until OPEN lies in the current folder; the numbers are the same.

    A run that is to be disturbed must not be over before, however fast the machine, and once it was disturbed it must
    not take its time. It is held from the first step on: ranks agree at a distance that their pace has set, and may
    hear of a signal late if they become slower all at once.
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


class GatedBks(_Held, Bks):
    """With convolutions and dropout."""

    def forward(self, images: Tensor) -> Tensor:
        self.hold()
        return super().forward(images)


class Unhurried(Mlp):
    """When its launcher has died it may take a minute to save and end, not 3 s: a busy machine may need them."""

    def __init__(self) -> None:
        super().__init__()
        parent.ORPHAN_GRACE_S = 60.0


class Masked(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))


class OwnLoss(Mlp):
    """With weights of its own and another value in training."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(10, 10)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(output), target) + (1.0 if self.training else 0.0)


class Shifting(Mlp):
    """Its loss takes labels that begin at 1, and changes them in place."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target.sub_(1))


class Scoring(Mlp):
    """No classifier, by its output's form; what it calls accuracy is undefined in its first and third evaluation.

    Its loss is negative: as a score it would be better than any accuracy.
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
    """Gives back what it is given, as near as two numbers can tell it; needs no targets."""

    def __init__(self) -> None:
        super().__init__()
        self.within, self.out = nn.Linear(64, 2), nn.Linear(2, 64)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images.flatten(1), self.out(self.within(images.flatten(1)))

    def loss(self, output: tuple[Tensor, Tensor], _target: None) -> Tensor:
        return nn.functional.mse_loss(*output)


class ForOdd(nn.Module):
    """Takes what `user_sets.Odd` gives; `in_place` changes what it and its loss are given."""

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
    """Knows the call in training, on one rank alone, in which something is to happen."""

    def __init__(self, call: int, rank: int, slow_s: float = 0.0) -> None:
        super().__init__(slow_s)
        self.call, self.rank = call, str(rank)

    def is_due(self) -> bool:
        self.hold()
        return self.calls == self.call and os.environ.get("RANK", "0") == self.rank


class Failing(_AtCall):
    """Says hello past Python at its first call and fails at its call number `call`."""

    def forward(self, images: Tensor) -> Tensor:
        if self.calls == 0:
            os.system("echo hello from rank $RANK")
        if self.is_due():
            raise ValueError("no such digit")
        return super().forward(images)


class Hanging(_AtCall):
    """Waits for ever in its call number `call`, in C and holding the interpreter's lock."""

    def forward(self, images: Tensor) -> Tensor:
        due = self.is_due()
        while due:
            ctypes.PyDLL(None).sleep(1000)
        return super().forward(images)


def negative(train: bool) -> ImageSet:
    found = mnist_part(train)
    found.labels[3] = -100
    return found
