"""The net. Its arguments besides num_classes, which comes from the data set, are model.args in config.yaml."""

from torch import Tensor, nn


class Net(nn.Module):
    """Points, float32 [B, 8], to class scores [B, num_classes]."""

    def __init__(self, num_classes: int, hidden: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))

    def forward(self, points: Tensor) -> Tensor:
        scores: Tensor = self.layers(points)
        return scores
