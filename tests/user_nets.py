"""Nets and a data set with what is unusual in user code."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor, nn
from user_sets import mnist_part

from dist_train.data import ImageSet
from dist_train.nets import Mlp


class Drawing(Mlp):
    """From all three generators."""

    def forward(self, images: Tensor) -> Tensor:
        noise = random.random() + float(np.random.rand()) + torch.rand(())
        return super().forward(images * (1 + noise) if self.training else images)


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


class Frozen(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


class Extra(Mlp):
    def get_extra_state(self) -> dict[str, int]:
        return {"a": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def negative(train: bool) -> ImageSet:
    found = mnist_part(train)
    found.labels[3] = -100
    return found
