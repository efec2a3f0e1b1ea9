"""This harness as a contestant, run by its own command line as a user runs it."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from dist_train.launch.subprocesses import output_of
from dist_train.runs.directory import RunDir
from dist_train.tools.bench.task import MEAN, STD, Found, Task


def measure(task: Task, mode: str = "eager", nproc: int = 1, threads: int | None = None) -> Found:
    """Measure one run of `dist-train train`, in child processes."""
    lines, result = train(
        {
            "seed": task.seed, "model.name": task.net, "global_batch_size": task.batch_size, "optimizer.lr": task.lr,
            "mixed_precision": task.precision, "step_mode": mode, "train_for": f"{2 * task.steps} steps",
            "log_every": task.steps, "eval_every": f"{task.steps} steps",
        },
        nproc,
        threads,
    )  # fmt: skip
    train_line = [line for line in lines if "train/loss" in line][-1]  # the first line is the warm-up's
    return {
        "samples_per_s": train_line["perf/samples_per_s"],
        "eval_samples_per_s": [line for line in lines if "val/loss" in line][-1]["perf/eval_samples_per_s"],
        "accuracy": result["test/accuracy"],
        "peak_memory_gib": train_line["perf/peak_memory_gib"],
        "data_wait_ms": train_line["perf/data_wait_ms"],
    }


def train(
    settings: dict[str, Any], nproc: int = 1, threads: int | None = None, config: str | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Train without W&B. Return the lines of metrics.jsonl, and result.json with `started`, a wall-clock time.

    `config` None: the contest's config, which is normalised MNIST and otherwise `settings`.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, run_dir = Path(folder) / "bench.yaml", RunDir(Path(folder) / "run")
        path.write_text(f"data: {{normalize: {{mean: [{MEAN}], std: [{STD}]}}}}\n")
        minimal = {"final_train_eval": False, "tracking.wandb": "disabled", "tracking.pictures": False}
        settings = {"runs_dir": folder} | minimal | settings
        overrides = [f"{key}={value}" for key, value in settings.items()]
        processes = ["--nproc", str(nproc)] if nproc > 1 else []
        command = ["train", "-q", "-c", config or str(path), "--run-name", "run", *processes, *overrides]
        started = time.time()
        output_of("dist_train", *command, environment={"OMP_NUM_THREADS": str(threads)} if threads else None)
        return list(run_dir.metrics.read()), run_dir.read_result() | {"started": started}
