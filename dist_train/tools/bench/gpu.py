"""Steps on one GPU: this harness in each mode beside loops written by hand, in turns in one process."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torch.profiler import ProfilerActivity, profile

from dist_train.config.batch_plan import BatchPlan
from dist_train.config.loading import parse_config
from dist_train.config.paths import default_data_root
from dist_train.config.schema import StepMode
from dist_train.data.batches import training_batches
from dist_train.data.sampler import ShardSampler
from dist_train.data.sets.image_set import ImageSet
from dist_train.data.sets.named_sets import load_named
from dist_train.distributed.world import World
from dist_train.errors import ConfigError
from dist_train.launch.subprocesses import output_of
from dist_train.models.registry import build_model
from dist_train.models.tasks.objective import Objective
from dist_train.tools.bench.interval import Interval
from dist_train.tools.bench.rounds import Round
from dist_train.tools.bench.task import MEAN, STD
from dist_train.training.step.lr_schedule import LearningRate
from dist_train.training.step.memory_format import is_faster_in_channels_last
from dist_train.training.step.train_step import Step

_ROUNDS = 9
_TURN_S = 0.1  # about how long a contestant steps in each round
_PROFILED_STEPS = 10

# contestant -> "ms" of each round; for ours also "launches" and "waits" per step, and "start": warm-up seconds.
Found = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One net on MNIST pictures, with Adam; other sizes than 28 are resized, with three equal channels."""

    net: str
    size: int
    batch_size: int
    examples: int
    precisions: tuple[str, ...]
    modes: tuple[StepMode, ...] = ("eager", "graph", "compile")


TASKS = {
    "mlp": Task("mlp", 28, 64, 60_000, ("no", "bf16")),
    "bks": Task("bks", 28, 64, 60_000, ("no", "bf16")),
    "conv": Task("conv", 28, 64, 60_000, ("no", "bf16")),
    # Not compiled, which takes more than a minute.
    "resnet18 at 32": Task("torchvision:resnet18", 32, 256, 8192, ("bf16",), ("eager", "graph")),
    "resnet18 at 224": Task("torchvision:resnet18", 224, 256, 1024, ("bf16",), ("eager", "graph")),
}


def measurements() -> dict[str, Callable[[], Found]]:
    """Return a function for each task and precision that measures all contestants in a process of its own.

    Raises:
        ConfigError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ConfigError("bench gpu: no CUDA device is available. The other parts run on a CPU.")
    return {
        f"{name}, {'fp32' if precision == 'no' else precision}": partial(_measure_in_process, name, precision)
        for name, task in TASKS.items()
        for precision in task.precisions
    }


def _measure_in_process(name: str, precision: str) -> Found:
    found: Found = json.loads(output_of("dist_train.tools.bench.gpu", name, precision).splitlines()[-1])
    return found


def _pictures(task: Task) -> ImageSet:
    mnist = load_named("mnist", default_data_root(), None)[0]
    images, labels = mnist.images[: task.examples], mnist.labels[: task.examples]
    if task.size != images.shape[-1]:
        images = interpolate(images.float(), (task.size, task.size)).to(torch.uint8).repeat(1, 3, 1, 1)
    return ImageSet(images, labels, mnist.classes)


def measure(task: Task, precision: str) -> Found:
    """Return the milliseconds per step of each contestant in each round, and what ours launches per step."""
    config = parse_config(
        {
            "model": {"name": task.net}, "global_batch_size": task.batch_size, "device": "cuda",
            "mixed_precision": precision, "data": {"normalize": {"mean": [MEAN], "std": [STD]}},
        }
    )  # fmt: skip
    world, pictures = World.join(config), _pictures(task)
    plan = BatchPlan.fit(task.batch_size, task.batch_size, 1)
    sampler = ShardSampler(len(pictures), plan, 0, 0)

    def new_net() -> nn.Module:
        spec = {"in_channels": pictures.images.shape[1], "num_classes": 10, "image_size": task.size}
        return build_model(config.model, spec, 0).to(world.device)

    def ours(mode: StepMode) -> Step:
        net = new_net()
        batches = training_batches(pictures, sampler, config.data, world.device, 0)
        if task.net.startswith("torchvision:") and is_faster_in_channels_last(net, batches, Objective(net), world):
            net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        step = Step(config, world, net, batches, plan, LearningRate(1e-3, 10**6))
        step.warm_up(0, mode)
        return step

    steps = {f"dist_train {mode}": step for mode in task.modes if (step := ours(mode)).mode == mode}
    images = pictures.images.to(world.device).float().div_(255).sub_(MEAN).div_(STD)
    by_hand = _LoopsByHand(images, pictures.labels.to(world.device), sampler, precision == "bf16")
    contestants: dict[str, Callable[[int], object]] = {
        **{name: step.take for name, step in steps.items()},
        "bare loop": by_hand.bare(new_net()),
        "captured by hand": by_hand.captured(new_net()),
        "Accelerate": by_hand.accelerated(new_net(), world.accelerator),
    }
    found: Found = {name: {"ms": times} for name, times in _in_turns(contestants, world.synchronize).items()}
    for name, step in steps.items():
        found[name] |= _launches(step.take) | {"start": step.warm_up_s}
    return found


class _LoopsByHand:
    """Loops over normalised floats on the device, as a user would write them."""

    def __init__(self, images: Tensor, labels: Tensor, sampler: ShardSampler, bf16: bool) -> None:
        self._images, self._labels, self._bf16 = images, labels, bf16
        self._sampler = sampler.on(images.device)

    def _update(self, net: nn.Module, optimizer: torch.optim.Optimizer, *, cache: bool = True) -> Callable[..., None]:
        def update(batch: Tensor) -> None:
            with torch.autocast("cuda", torch.bfloat16, enabled=self._bf16, cache_enabled=cache):
                loss = cross_entropy(net(self._images[batch]), self._labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return update

    def bare(self, net: nn.Module) -> Callable[[int], object]:
        update = self._update(net, torch.optim.Adam(net.parameters()))
        return lambda step: update(self._sampler.indices(step))

    def captured(self, net: nn.Module) -> Callable[[int], object]:
        """Its step captured as one CUDA graph: the limit of replaying."""
        update = self._update(net, torch.optim.Adam(net.parameters(), fused=True, capturable=True), cache=False)
        indices = self._sampler.indices(0).clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                update(indices)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            update(indices)

        def replay(step: int) -> None:
            indices.copy_(self._sampler.indices(step))
            graph.replay()

        return replay

    def accelerated(self, net: nn.Module, accelerator: Accelerator) -> Callable[[int], object]:
        model, optimizer = accelerator.prepare(net, torch.optim.Adam(net.parameters()))

        def take(step: int) -> None:
            batch = self._sampler.indices(step)
            loss = cross_entropy(model(self._images[batch]), self._labels[batch])
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()

        return take


def _in_turns(
    contestants: dict[str, Callable[[int], object]], synchronize: Callable[[], None]
) -> dict[str, list[float]]:
    """Return the milliseconds per step of each contestant in each round. The order rotates."""

    def ms(take: Callable[[int], object], count: int) -> float:
        synchronize()
        started = time.perf_counter()
        for number in range(count):
            take(number)
        synchronize()
        return 1000 * (time.perf_counter() - started) / count

    counts = {}
    for name, take in contestants.items():
        ms(take, 3)
        counts[name] = max(3, min(500, round(1000 * _TURN_S / ms(take, 3))))
    times: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(_ROUNDS):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            times[name].append(ms(contestants[name], counts[name]))
    return times


def _launches(take: Callable[[int], object]) -> dict[str, float]:
    """Return how often the host launches work (kernels, copies, graphs) and waits for the device, per step."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for number in range(_PROFILED_STEPS):
            take(number)
    calls = Counter({event.key: event.count for event in profiler.key_averages()})
    launches = sum(n for name, n in calls.items() if name.startswith("cu") and ("Launch" in name or "Async" in name))
    waits = sum(n for name, n in calls.items() if "Synchronize" in name) - 1  # one by the profiler
    return {"launches": launches / _PROFILED_STEPS, "waits": max(0, waits) / _PROFILED_STEPS}


def table(rounds: list[Round]) -> list[str]:
    """Return the results as Markdown."""
    lines = [
        f"Adam, batch 64 (resnet18: 256), one GPU. Milliseconds per step: median of n={_ROUNDS} rounds in turns in one "
        "process; ratios: median of the paired ratios with its 95 % interval; launches and waits of the host per step; "
        "seconds of the first passes with compiling and capture. compile: compiled, then captured.",
        "",
        "| net | contestant | ms | bare loop / this | captured by hand / this | launches | waits | start, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for net, found in rounds[0].items():
        for name, each in found.items():
            ratios = (_ratio(found, other, name) for other in ("bare loop", "captured by hand"))
            counts = (f"{each[key]:.1f}" if key in each else "" for key in ("launches", "waits", "start"))
            cells = (net, name, f"{statistics.median(each['ms']):.3f}", *ratios, *counts)
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _ratio(found: Found, other: str, name: str) -> str:
    if name == other:
        return ""
    return Interval.of([a / b for a, b in zip(found[other]["ms"], found[name]["ms"], strict=True)]).text("x")


def draw(rounds: list[Round], figure: Any) -> None:
    """Plot the milliseconds per step, one panel for each net."""
    found = rounds[0]
    figure.set_size_inches(9, 1.6 * len(found))
    for axis, (net, contestants) in zip(
        figure.subplots(len(found), 1, squeeze=False)[:, 0], found.items(), strict=True
    ):
        medians = {name: statistics.median(each["ms"]) for name, each in contestants.items()}
        colours = ["C0" if name.startswith("dist_train") else "C7" for name in medians]
        axis.barh(list(medians), list(medians.values()), color=colours)
        axis.invert_yaxis()
        axis.set_title(net)
    axis.set_xlabel("ms per step")


def main() -> None:
    name, precision = sys.argv[1:]
    print(json.dumps(measure(TASKS[name], precision)), flush=True)


if __name__ == "__main__":
    main()
