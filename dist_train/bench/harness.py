"""This harness as a contestant: by its own command line, like any user."""

from __future__ import annotations

import tempfile
from pathlib import Path

from dist_train.bench.task import MEAN, STD, Found, Task
from dist_train.launch import output_of
from dist_train.run_dir import RunDir, read_json


def measure(task: Task) -> Found:
    """One run of `dist-train train`, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        config, run_dir = Path(folder) / "bench.yaml", RunDir(Path(folder) / "run")
        config.write_text(f"data: {{normalize: {{mean: [{MEAN}], std: [{STD}]}}}}\n")
        settings = {
            "runs_dir": folder, "train_for": f"{task.epochs + 1} epochs", "model.name": task.net,
            "global_batch_size": task.batch_size, "optimizer.lr": task.lr, "mixed_precision": task.precision,
            "log_every": "1 epochs", "eval_every": 0, "final_train_eval": False, "tracking.wandb": "disabled",
        }  # fmt: skip
        overrides = [f"{key}={value}" for key, value in settings.items()]
        output_of("dist_train", "train", "-q", "-c", str(config), "--run-name", "run", *overrides)
        counted = [line for line in run_dir.read_metrics() if "train/loss" in line][1:]  # not the warm-up epoch
        return {
            "samples_per_s": len(counted) / sum(1 / line["perf/samples_per_s"] for line in counted),
            "accuracy": read_json(run_dir.result)["test/accuracy"],
            "peak_memory_gib": counted[-1]["perf/peak_memory_gib"],
        }
