"""After a failure: the last good checkpoint, and the command that continues from it."""

from __future__ import annotations

import shlex

from dist_train.checkpoints.manifest import good_checkpoints
from dist_train.errors import CheckpointError, ConfigError, TrainingDiverged
from dist_train.runs.directory import RunDir

# What they need is another setting, more room or other weights; of the checkpoint they speak themselves.
_SAY_ENOUGH = (ConfigError.__name__, CheckpointError.__name__, TrainingDiverged.__name__)


def is_self_explanatory(kind: str) -> bool:
    """Whether after an error of this class `resume_hint` adds nothing."""
    return kind in _SAY_ENOUGH


def resume_hint(run_dir: RunDir, nproc: int | None = None) -> str:
    """`nproc` None: ranks on several machines, or of a job: only who started them knows how."""
    newest = next(good_checkpoints(run_dir), None)
    if newest is None:
        return "There is no checkpoint yet."
    resume = f"--resume {shlex.quote(str(run_dir.path))}"
    if nproc is None:
        return f"The last good checkpoint is {newest}. To go on from there: the same command, with {resume}"
    ranks = f" --nproc {nproc}" if nproc > 1 else ""
    return f"The last good checkpoint is {newest}. To go on from there: dist-train train {resume}{ranks}"
