"""Samples per second of this harness against the same net fed by a torchvision DataLoader, in one run.

Each contestant trains one epoch of MNIST at batch 64 with Adam in a process of its own, with the same threads, after a
warm-up of 50 steps; they take turns. Prints a table; `--write` puts it into docs/benchmarks.md. Exit 1 if the median
ratio is under the target (mlp 8x, bks 2x).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

TARGETS = {"mlp": 8.0, "bks": 2.0}
DOC = Path(__file__).parents[2] / "docs/benchmarks.md"
WARM_UP_STEPS = 50


def harness(net: str) -> None:
    """One epoch by `dist-train train`; speed from its result.json."""
    with tempfile.TemporaryDirectory() as folder:
        settings = ["-o", "train_for=1 epochs", "-o", "final_train_eval=false", "-o", "tracking.wandb=disabled"]
        command = [
            sys.executable,
            "-m",
            "dist_train",
            "train",
            "-c",
            f"mnist_{net}",
            "-q",
            "--run-name",
            "r",
            *settings,
        ]
        subprocess.run([*command, "-o", f"runs_dir={folder}"], check=True, stdout=subprocess.DEVNULL)
        found = json.loads((Path(folder) / "r/result.json").read_text())
    print(json.dumps({"samples_per_s": found["samples_per_s"], "accuracy": found["test/accuracy"]}))


def data_loader(net: str, num_workers: int) -> None:
    """The tutorials' loop: torchvision's MNIST through a DataLoader."""
    import torch
    from torch.utils.data import DataLoader

    from dist_train.config import default_data_root
    from dist_train.nets import MODELS
    from dist_train.vision import import_torchvision

    torchvision = import_torchvision()
    transform = torchvision.transforms.ToTensor()
    sets = [torchvision.datasets.MNIST(default_data_root(), train=part, transform=transform) for part in (True, False)]
    torch.manual_seed(0)
    model = MODELS[net]()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    criterion = torch.nn.CrossEntropyLoss()
    loader = DataLoader(sets[0], batch_size=64, shuffle=True, num_workers=num_workers, drop_last=True)
    for step, (images, labels) in enumerate(loader):
        if step == WARM_UP_STEPS:
            started = time.perf_counter()
        optimizer.zero_grad()
        criterion(model(images), labels).backward()
        optimizer.step()
    seconds = time.perf_counter() - started
    model.eval()
    with torch.no_grad():
        correct = sum(int((model(x).argmax(1) == y).sum()) for x, y in DataLoader(sets[1], batch_size=1000))
    samples = 64 * (len(loader) - WARM_UP_STEPS)
    print(json.dumps({"samples_per_s": round(samples / seconds, 1), "accuracy": correct / len(sets[1])}))


def contend(name: str, net: str) -> dict[str, float]:
    """One contestant in a process of its own."""
    command = [sys.executable, __file__, "--contestant", name, "--net", net]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(repetitions: int) -> tuple[list[str], bool]:
    """The lines of the table, and whether all targets are met."""
    lines = ["| net | dist-train | DataLoader (best of 0 and 2 workers) | ratio (median of pairs) | test accuracy |"]
    lines.append("|---|---|---|---|---|")
    met = True
    for net, target in TARGETS.items():
        rounds = [{name: contend(name, net) for name in ("harness", "loader0", "loader2")} for _ in range(repetitions)]
        ours = [each["harness"]["samples_per_s"] for each in rounds]
        theirs = [max(each["loader0"]["samples_per_s"], each["loader2"]["samples_per_s"]) for each in rounds]
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        accuracies = [100 * statistics.median(each[name]["accuracy"] for each in rounds) for name in rounds[0]]
        ratio = statistics.median(ratios)
        met &= ratio >= target
        lines.append(
            f"| {net} | {statistics.median(ours):,.0f}/s | {statistics.median(theirs):,.0f}/s | {ratio:.1f}x "
            f"({min(ratios):.1f} to {max(ratios):.1f}; target {target:.0f}x) "
            f"| {accuracies[0]:.2f} % against {max(accuracies[1:]):.2f} % |"
        )
        print(lines[-1], flush=True)
    return lines, met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contestant")
    parser.add_argument("--net")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.contestant == "harness":
        harness(options.net)
        return 0
    if options.contestant:
        data_loader(options.net, int(options.contestant[-1]))
        return 0
    lines, met = measure(options.repetitions)
    if options.write:
        from importlib.metadata import version

        from dist_train.facts import cpu_model

        where = f"{cpu_model()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {version('torch')}"
        head = f"One epoch of MNIST, batch 64, Adam, one process, n={options.repetitions}. {date.today()}, {where}."
        DOC.write_text(
            "\n".join(["# Benchmarks", "", "## Against a DataLoader (`make bench`)", "", head, "", *lines, ""])
        )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
