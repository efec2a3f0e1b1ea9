"""Provenance of a run: versions, code, machine, batch plan, how it was started. Written to run.json; no secrets."""

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
from dist_train.data.fingerprint import Fingerprint, differences
from dist_train.distributed.process_info import surroundings
from dist_train.distributed.world import World

_PACKAGES = ("torch", "torchvision", "accelerate", "wandb", "numpy", "pillow", "simplejpeg")


def collect_provenance(world: World, plan: BatchPlan, hosts: list[str], init_from: str | None) -> dict[str, Any]:
    """Return what determines the numbers of a run, and what later readers need.

    `init_from`: the run whose weights it began with.
    """
    cuda = world.device.type == "cuda"
    return {
        "dist_train": __version__,
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in _PACKAGES}},
        "git_commit": git_commit(Path.cwd()),
        **describe_start(world, hosts, init_from),
        "batch_plan": asdict(plan),
        "device": torch.cuda.get_device_name(world.device) if cuda else world.device.type,
        "mixed_precision": world.mixed_precision,
        "cpu": cpu_model(),
    }


def describe_start(world: World, hosts: list[str], init_from: str | None) -> dict[str, Any]:
    """Return what a later start needs to be the same."""
    return {
        "argv": sys.argv,
        **surroundings(),
        "init_from": init_from,
        "started_by": world.process.started_by,
        "hosts": hosts,
        "world_size": world.size,
        "num_nodes": len(set(hosts)),
        "num_threads": world.num_threads,
        "exchange": world.exchange,
    }


# These determine how a step is divided: they change the result of a net that depends on the division.
DIVISION_FACTORS = ("world_size", "micro_steps", "device")


def changed_determinism_factors(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Return the changes between two starts that affect the bits of the numbers: {"num_threads": "2 -> 1", ...}.

    What the first did not record, since its version did not know it, counts as unchanged.
    """
    old, new = (
        {name: _lookup(provenance, name) for name in (*DIVISION_FACTORS, *_ROUNDING)} for provenance in (before, now)
    )
    return {name: f"{old[name]} -> {new[name]}" for name in old if old[name] not in (None, new[name])}


_ROUNDING = ("num_threads", "exchange", "step_mode", "cpu", "torch")


def _lookup(provenance: dict[str, Any], name: str) -> Any:
    nested = {"micro_steps": ("batch_plan", "grad_accum_steps"), "torch": ("versions", "torch")}
    if name not in nested:
        return provenance.get(name)
    section, key = nested[name]
    return provenance.get(section, {}).get(key)


def changed_data(before: dict[str, Any], now: Mapping[str, Fingerprint]) -> list[str]:
    """Return the splits whose examples differ from those that the run began with, as one sentence each.

    Such as "The train set has 109 examples, but the run began with 101." Runs of older versions recorded no identity.
    """
    changes = differences(now, before["data_identity"]) if "data_identity" in before else []
    return [f"The {split} set has {here}, but the run began with {then}." for split, here, then in changes]


def git_commit(folder: Path) -> str | None:
    """Return the commit checked out around `folder`, read from .git directly: git may not be installed."""
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
