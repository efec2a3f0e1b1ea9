"""The results of a benchmark as Markdown, JSON and a picture."""

from __future__ import annotations

import json
import os
import platform
import statistics
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dist_train.bench.contest import OURS, Interval, Rounds, best_peer, ratios
from dist_train.bench.task import Task
from dist_train.environment import available_cores
from dist_train.errors import ConfigError
from dist_train.facts import cpu_model

Contests = list[tuple[Task, Rounds]]


def machine() -> dict[str, Any]:
    """Where it was measured."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    threads = int(os.environ.get("OMP_NUM_THREADS") or available_cores())
    return {
        "date": f"{date.today()}",
        "device": gpu or cpu_model(),
        "cores": available_cores(),
        "threads": threads,
        "oversubscribed": gpu is None and threads > available_cores(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "torchvision", "accelerate")},
    }


def markdown(contests: Contests, where: dict[str, Any]) -> str:
    first, rounds = contests[0]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    threads = f"{where['threads']} threads{' (OVERSUBSCRIBED)' if where['oversubscribed'] else ''}"
    lines = [
        f"MNIST, batch {first.batch_size}, Adam, one process, one warm-up epoch and {first.epochs} counted, "
        f"n={len(rounds)} rounds; median samples/s, and the median of the paired ratios with its 95 % interval.",
        f"{where['device']}, {where['cores']} cores, {threads}, Python {where['python']}, {versions}; {where['date']}.",
        "",
        "| net | precision | contestant | samples/s | dist-train against it | test accuracy | peak GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, found in contests:
        best = best_peer(found) if len(found[0]) > 2 else ""
        for name in found[0]:
            middle = {key: statistics.median(each[name][key] for each in found) for key in found[0][name]}
            ratio = "" if name == OURS else _text(ratios(found, OURS, name))
            lines.append(
                f"| {task.net} | {task.precision_name} "
                f"| {name}{' (best peer)' if name == best else ''} | {middle['samples_per_s']:,.0f} | {ratio} "
                f"| {100 * middle['accuracy']:.2f} % | {middle['peak_memory_gib']:.2f} |"
            )
    return "\n".join([*lines, ""])


def _text(ratio: Interval) -> str:
    return f"{ratio.median:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"


def write(contests: Contests, folder: Path) -> None:
    """speed.md, speed.json and speed.png."""
    folder.mkdir(parents=True, exist_ok=True)
    where = machine()
    (folder / "speed.md").write_text(markdown(contests, where))
    plain = [{"net": task.net, "precision": task.precision, "rounds": rounds} for task, rounds in contests]
    (folder / "speed.json").write_text(json.dumps({"machine": where, "contests": plain}, indent=1) + "\n")
    picture(contests, where, folder / "speed.png")


def picture(contests: Contests, where: dict[str, Any], path: Path) -> None:
    """Samples per second of each contestant, with the range of all rounds.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ConfigError("The picture needs matplotlib: pip install 'dist-train[plot]'.") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(contests), figsize=(4 * len(contests), 3.2), squeeze=False)
    for axis, (task, rounds) in zip(axes[0], contests, strict=True):
        for position, name in enumerate(rounds[0]):
            speeds = [each[name]["samples_per_s"] for each in rounds]
            middle = statistics.median(speeds)
            errors = [[middle - min(speeds)], [max(speeds) - middle]]
            axis.barh(position, middle, xerr=errors, color="C0" if name == OURS else "C7", capsize=3)
        axis.set_yticks(range(len(rounds[0])), list(rounds[0]))
        axis.invert_yaxis()
        axis.set_title(f"{task.net}, {task.precision_name}")
        axis.set_xlabel("samples/s")
    figure.suptitle(f"{where['device']}, batch {contests[0][0].batch_size}, n={len(contests[0][1])}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
