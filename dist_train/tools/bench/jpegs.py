"""Batches from a folder of JPEGs: by each decoder, prepared, and by torchvision's loop; with and without workers.

`python -m dist_train.tools.bench.jpegs` measures each once and prints one line of JSON on stdout.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dist_train.config.batch_plan import BatchPlan
from dist_train.config.data import Decoder
from dist_train.config.loading import parse_config
from dist_train.data.batches import training_batches
from dist_train.data.sampler import ShardSampler
from dist_train.data.sets.image_folder import ImageFolder
from dist_train.data.sets.image_set import Examples, num_examples
from dist_train.data.sets.preparation import prepare
from dist_train.data.sets.prepared_folder import PreparedFolder
from dist_train.launch.subprocesses import output_of
from dist_train.tools.bench.interval import Interval
from dist_train.torchvision_compat import import_torchvision

Found = dict[str, dict[str, float]]  # by loop and workers: images_per_s, cpu_ms per image

TORCHVISION = "torchvision"
WORKERS = (0, 2)
_IMAGE_SIZE = 224
_WIDTH, _HEIGHT, _QUALITY = 500, 375, 90
_BATCH_SIZE = 32
_EPOCH, _TIMED = 4, 10  # batches


def measure() -> Found:
    """Measure each loop once, in a process of its own with one thread."""
    found: Found = json.loads(output_of("dist_train.tools.bench.jpegs").splitlines()[-1])
    return found


def label(loop: str, workers: int) -> str:
    return f"{loop}, {workers} workers"


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root, prepared = Path(name) / "jpegs", Path(name) / "prepared"
        _write_jpegs(root / "train")
        prepare(root, prepared, _IMAGE_SIZE, "pil")
        decoders: list[Decoder] = ["pil", "simplejpeg"] if find_spec("simplejpeg") else ["pil"]
        loops: dict[str, Callable[[int], Iterator[Any]]] = {
            decoder: partial(_batches, ImageFolder(root / "train", _IMAGE_SIZE, decoder), decoder)
            for decoder in decoders
        }
        loops[TORCHVISION] = partial(_batches_of_torchvision, root / "train")
        none, workers = WORKERS
        resident = _batches(PreparedFolder(prepared / "train", _IMAGE_SIZE, "pil").in_memory(), "pil", none)
        found = _time(
            {**{label(loop, none): batches(none) for loop, batches in loops.items()}, label("prepared", none): resident}
        )
        for loop, batches in loops.items():  # alone: workers go on while others have their turn
            found |= _time({label(loop, workers): batches(workers)})
        print(json.dumps(found), flush=True)


def _write_jpegs(folder: Path) -> None:
    """Write an epoch of colour gradients with grain, of about as many bytes as a photograph of this size."""
    random = np.random.default_rng(0)
    for number in range(_EPOCH * _BATCH_SIZE):
        path = folder / str(number % 2) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        colours = Image.fromarray(random.integers(256, size=(12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(colours.resize((_WIDTH, _HEIGHT), Image.Resampling.BICUBIC), dtype=np.float32)
        grain = random.normal(0, 12, (_HEIGHT, _WIDTH, 1)).astype(np.float32)
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(path, quality=_QUALITY)


def _batches(examples: Examples, decoder: Decoder, workers: int) -> Iterator[Any]:
    data = {"name": "image_folder", "image_size": _IMAGE_SIZE, "decoder": decoder, "num_workers": workers}
    config = parse_config({"data": data, "global_batch_size": _BATCH_SIZE, "per_device_batch_size": _BATCH_SIZE})
    sampler = ShardSampler(num_examples(examples), BatchPlan.of(config, 1), 0, config.seed)
    batches = training_batches(examples, sampler, config.data, torch.device("cpu"), config.seed)
    step = 0
    while True:
        yield batches.at(step, 0)
        step += 1


def _batches_of_torchvision(folder: Path, workers: int) -> Iterator[Any]:
    torchvision = import_torchvision()
    transforms = torchvision.transforms
    chain = [transforms.Resize(_IMAGE_SIZE), transforms.CenterCrop(_IMAGE_SIZE), transforms.ToTensor()]
    dataset = torchvision.datasets.ImageFolder(folder, transforms.Compose(chain))
    loader: DataLoader[Any] = DataLoader(
        dataset, _BATCH_SIZE, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )
    while True:
        yield from loader


def _time(loops: dict[str, Iterator[Any]]) -> Found:
    """Time loops, batch by batch in turns, after an epoch of warm-up. CPU time is also that of loader workers."""
    for batches in loops.values():
        for _ in islice(batches, _EPOCH):
            pass
    wall_s, cpu_s = dict.fromkeys(loops, 0.0), dict.fromkeys(loops, 0.0)
    for _ in range(_TIMED):
        for name, batches in loops.items():
            began, used = time.perf_counter(), _cpu_s()
            next(batches)
            wall_s[name] += time.perf_counter() - began
            cpu_s[name] += _cpu_s() - used
    images = _TIMED * _BATCH_SIZE
    return {name: {"images_per_s": images / wall_s[name], "cpu_ms": 1000 * cpu_s[name] / images} for name in loops}


def _cpu_s() -> float:
    workers = [each.cpu_times() for each in psutil.Process().children()]
    return time.process_time() + sum(each.user + each.system for each in workers)


def table(rounds: list[Found]) -> list[str]:
    """Return the results as Markdown."""
    lines = [
        f"JPEGs of {_WIDTH} x {_HEIGHT} to batches of {_BATCH_SIZE} squares of {_IMAGE_SIZE} pixels, one thread, "
        f"n={len(rounds)} rounds; medians, and the median of the ratios to torchvision's loop in the same round with "
        f"its 95 % interval. CPU: of the process and its loader workers.",
        "",
        "| loop | images/s | against torchvision | CPU ms per image | torchvision's CPU against it |",
        "|---|---|---|---|---|",
    ]
    for workers in WORKERS:
        theirs = label(TORCHVISION, workers)
        for name in (name for name in rounds[0] if name.endswith(label("", workers))):
            speed, cpu = ([each[name][key] for each in rounds] for key in ("images_per_s", "cpu_ms"))
            faster = Interval.of([each[name]["images_per_s"] / each[theirs]["images_per_s"] for each in rounds])
            cheaper = Interval.of([each[theirs]["cpu_ms"] / each[name]["cpu_ms"] for each in rounds])
            lines.append(
                f"| {name} | {Interval.of(speed).median:.0f} | {faster.text('x')} "
                f"| {Interval.of(cpu).median:.2f} | {cheaper.text('x')} |"
            )
    return lines


def draw(rounds: list[Found], figure: Any) -> None:
    """Plot each loop's images per second, with the range of all rounds."""
    figure.set_size_inches(6, 3)
    axis = figure.subplots()
    for position, name in enumerate(rounds[0]):
        speeds = Interval.of([each[name]["images_per_s"] for each in rounds])
        errors = [[speeds.median - speeds.low], [speeds.high - speeds.median]]
        axis.barh(position, speeds.median, xerr=errors, color="C7" if TORCHVISION in name else "C0", capsize=3)
    axis.set_yticks(range(len(rounds[0])), list(rounds[0]))
    axis.invert_yaxis()
    axis.set_xlabel(f"images/s, n={len(rounds)}")


if __name__ == "__main__":
    main()
