"""What every contestant of a benchmark trains, and how it is timed and counted."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.config import default_data_root
from dist_train.data.named import load_named
from dist_train.metrics import peak_memory_gib
from dist_train.nets import MODELS

MEAN, STD = 0.1307, 0.3081

Found = dict[str, float]  # what a contestant measured: samples_per_s, accuracy (0..1), peak_memory_gib


@dataclass(kw_only=True)
class Task:
    """MNIST, one of our nets, Adam. The first epoch is the warm-up and not counted."""

    net: str = "mlp"
    batch_size: int = 64
    epochs: int = 1  # counted ones
    lr: float = 1e-3
    precision: str = "no"  # or bf16
    num_workers: int = 0  # of a DataLoader
    seconds: list[float] = field(default_factory=list)  # of each counted epoch

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def precision_name(self) -> str:
        return "fp32" if self.precision == "no" else self.precision

    @property
    def data_root(self) -> Path:
        return default_data_root()

    def new_net(self) -> nn.Module:
        torch.manual_seed(0)
        return MODELS[self.net]()

    def timed_epochs(self) -> Iterator[int]:
        """The epochs, the warm-up first; the clock runs while the caller works on a counted one."""
        for epoch in range(self.epochs + 1):
            started = time.perf_counter()
            yield epoch
            self._synchronize()
            if epoch:
                self.seconds.append(time.perf_counter() - started)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def resident(self, train: bool) -> tuple[Tensor, Tensor]:
        """The images as normalised floats [N, 1, 28, 28] and the labels [N], on the device."""
        found = load_named("mnist", self.data_root, None)[0 if train else 1]
        images = found.images.to(self.device).float().div_(255).sub_(MEAN).div_(STD)
        return images, found.labels.to(self.device)

    @torch.no_grad()
    def test_accuracy(self, net: nn.Module) -> float:
        images, labels = self.resident(train=False)
        net.eval()
        right = [
            net(part).argmax(1).eq(of).sum() for part, of in zip(images.split(1000), labels.split(1000), strict=True)
        ]
        return int(torch.stack(right).sum()) / len(labels)

    def report(self, accuracy: float) -> None:
        """One line of JSON on stdout: what the contestant found."""
        counted = len(self.seconds) * (60_000 // self.batch_size) * self.batch_size
        found: Found = {
            "samples_per_s": counted / sum(self.seconds),
            "accuracy": accuracy,
            "peak_memory_gib": peak_memory_gib(self.device),
        }
        print(json.dumps(found), flush=True)

    def to_argument(self) -> str:
        return json.dumps(asdict(self))


def task_of_this_process() -> Task:
    """The task that the benchmark gave this contestant as its only argument."""
    settings: dict[str, Any] = json.loads(sys.argv[1])
    return Task(**settings)
