"""Write the results of one part of the benchmark as Markdown, JSON and a picture."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from dist_train.distributed.process_info import available_cores
from dist_train.errors import ConfigError
from dist_train.training.provenance import cpu_model


def machine() -> dict[str, Any]:
    """Return the hardware and the versions that were measured."""
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


def describe(where: dict[str, Any]) -> str:
    """Return the result of `machine` as one sentence."""
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    threads = f"{where['threads']} threads{' (OVERSUBSCRIBED)' if where['oversubscribed'] else ''}"
    return (
        f"{where['device']}, {where['cores']} cores, {threads}, Python {where['python']}, {versions}; {where['date']}."
    )


def check_pictures() -> None:
    """Check that pictures can be drawn, before anything is measured.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if not find_spec("matplotlib"):
        raise ConfigError("The pictures need matplotlib: pip install 'dist-train[plot]'.")


def write(part: str, table: list[str], found: Any, draw: Callable[[Any], None], folder: Path) -> None:
    """Write PART.md, PART.json and PART.png. `draw` gets an empty matplotlib figure."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    where = machine()
    picture = f"![{part}]({part}.png)"
    lines = [f"# {part.capitalize()}", "", describe(where), "", *table, "", picture, ""]
    (folder / f"{part}.md").write_text("\n".join(lines))
    (folder / f"{part}.json").write_text(
        json.dumps({"machine": where, "found": found}, indent=1, default=asdict) + "\n"
    )
    figure = pyplot.figure(layout="constrained")
    draw(figure)
    figure.suptitle(f"{where['device']}, {where['date']}", fontsize="small")
    figure.savefig(folder / f"{part}.png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)
