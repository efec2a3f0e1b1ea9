"""After a failure: the last good checkpoint, and the command that continues from it."""

from __future__ import annotations

import shlex

from dist_train.checkpoints.manifest import good
from dist_train.errors import CheckpointError, ConfigError, TrainingDiverged
from dist_train.runs.directory import RunDir

# What they need is another setting, more room or other weights; of the checkpoint they speak themselves.
_SAY_ENOUGH = (ConfigError.__name__, CheckpointError.__name__, TrainingDiverged.__name__)


def says_enough(kind: str) -> bool:
    """Whether after an error of this class `how_to_go_on` adds nothing."""
    return kind in _SAY_ENOUGH


def how_to_go_on(run_dir: RunDir, nproc: int | None = None) -> str:
    """`nproc` None: ranks on several machines, or of a job: only who started them knows how."""
    newest = next(good(run_dir), None)
    if newest is None:
        return "There is no checkpoint yet."
    resume = f"--resume {shlex.quote(str(run_dir.path))}"
    if nproc is None:
        return f"The last good checkpoint is {newest}. To go on from there: the same command, with {resume}"
    ranks = f" --nproc {nproc}" if nproc > 1 else ""
    return f"The last good checkpoint is {newest}. To go on from there: dist-train train {resume}{ranks}"
