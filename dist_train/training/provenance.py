"""What a run was made with: versions, code, machine, batch plan. Written to run.json; no secrets, no environment."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dist_train import __version__
from dist_train.config.batch_plan import BatchPlan
from dist_train.data.identity import Identity, differences
from dist_train.distributed.world import World

_PACKAGES = ("torch", "torchvision", "accelerate", "wandb", "numpy")


def collect_provenance(world: World, plan: BatchPlan, hosts: list[str]) -> dict[str, Any]:
    """What decides the numbers of a run, and what somebody who reads them later asks for."""
    cuda = world.device.type == "cuda"
    return {
        "dist_train": __version__,
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in _PACKAGES}},
        "git_commit": git_commit(Path.cwd()),
        "argv": sys.argv,
        "started_by": world.place.started_by,
        "hosts": hosts,
        "world_size": world.size,
        "num_nodes": len(set(hosts)),
        "batch_plan": asdict(plan),
        "device": torch.cuda.get_device_name(world.device) if cuda else world.device.type,
        "mixed_precision": world.mixed_precision,
        "num_threads": world.num_threads,
        "cpu": cpu_model(),
    }


# By these a step is divided: the result of a net that depends on the division is another one.
DIVISION_FACTORS = ("world_size", "micro_steps", "device")


def changed_determinism_factors(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """What differs between two starts of a run, and decides the bits of its numbers: {"num_threads": "2 -> 1", ...}."""
    old, new = (
        {name: _of(provenance, name) for name in (*DIVISION_FACTORS, *_ROUNDING)} for provenance in (before, now)
    )
    return {name: f"{old[name]} -> {new[name]}" for name in old if old[name] != new[name]}


_ROUNDING = ("num_threads", "step_mode", "cpu", "torch")


def _of(provenance: dict[str, Any], name: str) -> Any:
    nested = {"micro_steps": ("batch_plan", "grad_accum_steps"), "torch": ("versions", "torch")}
    if name not in nested:
        return provenance.get(name)
    section, key = nested[name]
    return provenance.get(section, {}).get(key)


def changed_data(before: dict[str, Any], now: Mapping[str, Identity]) -> list[str]:
    """In which splits the examples are others than those that a run began with, by its facts: ["The train set has 109
    examples, where the run began with 101.", ...]. An older version recorded none."""
    found = differences(now, before["data_identity"]) if "data_identity" in before else []
    return [f"The {split} set has {here}, where the run began with {then}." for split, here, then in found]


def git_commit(folder: Path) -> str | None:
    """The commit that is checked out around `folder`, read from .git itself: git may not be there."""
    for parent in (folder, *folder.parents):
        git = parent / ".git"
        if not git.is_dir():
            continue
        with suppress(OSError):
            head = (git / "HEAD").read_text().strip()
            if not head.startswith("ref: "):
                return head
            ref = head.removeprefix("ref: ")
            if (git / ref).exists():
                return (git / ref).read_text().strip()
            packed = (git / "packed-refs").read_text().splitlines()
            return next((line.split()[0] for line in packed if line.endswith(" " + ref)), None)
    return None


def cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
