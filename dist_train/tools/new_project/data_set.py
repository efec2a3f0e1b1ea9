"""The data set. It is built twice: with train=True to train, with train=False to validate and test."""

import torch
from torch import Tensor


class Points:
    """Random points in 8 dimensions; the class says whether their coordinates add up to more than 0."""

    classes = ("below", "above")

    def __init__(self, train: bool) -> None:
        generator = torch.Generator().manual_seed(int(train))  # every process must build the same set
        self.points = torch.randn(1000, 8, generator=generator)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        point = self.points[index]
        return point, int(point.sum() > 0)
