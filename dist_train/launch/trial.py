"""A trial of net and data: a few steps in a process of its own, of which nothing is kept."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import psutil

from dist_train.errors import LaunchError
from dist_train.launch.subprocesses import limited_output_of
from dist_train.runs.directory import RunDir
from dist_train.runs.train_arguments import TrainArguments

_TRY_S = 300.0


def try_batch(arguments: TrainArguments) -> str:
    """Train for a few steps in a folder that is removed at the end; return what the training printed.

    `arguments`: without a run to resume.

    Raises:
        LaunchError: net and data do not go together, in the words of the training, or it took too long.
    """
    with tempfile.TemporaryDirectory(prefix="dist_train-") as folder:
        trial = replace(arguments, overrides=(*arguments.overrides, f"runs_dir={folder}", "tracking.pictures=false"))
        try:
            printed = limited_output_of(
                *trial.of_a_rank(), "--fast-dev-run", "--run-name=trial", timeout_s=_TRY_S, memory_bytes=memory_bytes()
            )
        except LaunchError as error:
            raise LaunchError(RunDir(Path(folder) / "trial").read_error().get("message", str(error))) from None
        return "\n".join(line for line in printed.splitlines() if folder not in line)


def memory_bytes() -> int:
    """Return how much a child may allocate: half of the memory, so that a training beside it does not lose its own."""
    return psutil.virtual_memory().total // 2
