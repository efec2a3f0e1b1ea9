"""Readers of a run directory and comparisons of runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dist_train.atomic_files import read_json
from dist_train.runs.directory import RunDir


def status_of(run_dir: Path) -> dict[str, Any]:
    """Return status.json, or an empty dict if it does not exist."""
    return read_json(run_dir / "status.json")


def step_of(run_dir: Path) -> int:
    return int(status_of(run_dir).get("step", 0))


def status(run_dir: Path) -> str:
    return str(status_of(run_dir)["state"])


def last_checkpoint(run_dir: Path) -> Path:
    return RunDir(run_dir).step_folders()[0]


def weights(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = load_file(str(last_checkpoint(run_dir) / "model.safetensors"))
    return found


def optimizer_state(run_dir: Path) -> Any:
    return torch.load(last_checkpoint(run_dir) / "training.pt", weights_only=True)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def metrics_without_times(run_dir: Path) -> list[dict[str, Any]]:
    """Return the metrics that must be equal in a resumed and in an uninterrupted run."""
    times = ("time", "epoch_s", "attempt")
    return [
        {key: value for key, value in line.items() if key not in times and not key.startswith("perf/")}
        for line in metrics(run_dir)
    ]


def train_losses(run_dir: Path) -> list[float]:
    return [line["train/loss"] for line in metrics(run_dir) if "train/loss" in line]


def largest_difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def assert_bit_identical(run: Path, other: Path) -> None:
    """Assert equal weights, optimizer state and metrics lines, except times."""
    assert largest_difference(weights(run), weights(other)) == 0
    assert_equal(optimizer_state(run), optimizer_state(other))
    assert metrics_without_times(run) == metrics_without_times(other)


def assert_equal(a: Any, b: Any) -> None:
    """Assert that nested containers with tensors are bit-identical."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for first, second in zip(a, b, strict=True):
            assert_equal(first, second)
    else:
        assert a == b


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
