"""The task that every contestant of a benchmark trains, and how it is timed and counted."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.config.paths import default_data_root
from dist_train.data.sets.named_sets import load_named
from dist_train.distributed.devices import peak_memory_gib
from dist_train.models.nets import MODELS

MEAN, STD = 0.1307, 0.3081
EXAMPLES = 60_000

# A contestant's results: samples_per_s, eval_samples_per_s, accuracy (0..1), peak_memory_gib, and any others.
Found = dict[str, float]


@dataclass(kw_only=True)
class Task:
    """MNIST, one of our nets, Adam: `steps` updates of warm-up, then as many that are timed."""

    net: str = "mlp"
    batch_size: int = 64  # over all processes
    steps: int = 10**9  # at most one epoch
    lr: float = 1e-3
    precision: str = "no"  # or bf16
    num_workers: int = 0  # of a DataLoader
    seed: int = 0  # of weights and order; differs in each round

    def __post_init__(self) -> None:
        self.steps = min(self.steps, EXAMPLES // self.batch_size)
        self.seconds = 0.0  # duration of the timed steps

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def precision_name(self) -> str:
        return "fp32" if self.precision == "no" else self.precision

    def new_net(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return MODELS[self.net]()

    def rounds(self) -> Iterator[int]:
        """Yield the number of steps to take: first for the warm-up, then for the timed steps."""
        for timed in (False, True):
            started = time.perf_counter()
            yield self.steps
            self._synchronize()
            if timed:
                self.seconds = time.perf_counter() - started

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def resident(self, train: bool) -> tuple[Tensor, Tensor]:
        """Return the images as normalised floats [N, 1, 28, 28] and the labels [N], on the device."""
        dataset = load_named("mnist", default_data_root(), None)[0 if train else 1]
        images = dataset.images.to(self.device).float().div_(255).sub_(MEAN).div_(STD)
        return images, dataset.labels.to(self.device)

    def report(self, net: nn.Module) -> None:
        """Print the contestant's results as one line of JSON on stdout."""
        accuracy, evaluation_s = self._evaluate(net)
        results: Found = {
            "samples_per_s": self.steps * self.batch_size / self.seconds,
            "eval_samples_per_s": 10_000 / evaluation_s,
            "accuracy": accuracy,
            "peak_memory_gib": peak_memory_gib(self.device),
        }
        print(json.dumps(results), flush=True)

    @torch.no_grad()
    def _evaluate(self, net: nn.Module) -> tuple[float, float]:
        """Return the test accuracy by the bare fp32 loop over resident images, and the seconds of its second pass."""
        images, labels = self.resident(train=False)
        net.eval()
        for _ in range(2):
            self._synchronize()
            started = time.perf_counter()
            batches = zip(images.split(256), labels.split(256), strict=True)
            correct = torch.stack([net(part).argmax(1).eq(of).sum() for part, of in batches])
            accuracy = int(correct.sum()) / len(labels)
            seconds = time.perf_counter() - started
        return accuracy, seconds

    def to_argument(self) -> str:
        return json.dumps(asdict(self))


def task_of_this_process() -> Task:
    """Return the task that the benchmark passed to this contestant as its only argument."""
    settings: dict[str, Any] = json.loads(sys.argv[1])
    return Task(**settings)
