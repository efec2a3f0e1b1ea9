"""The hint after a failure: the last good checkpoint and the command that resumes from it."""

from __future__ import annotations

import shlex

from dist_train.checkpoints.manifest import good_checkpoints
from dist_train.errors import CheckpointError, ConfigError, TrainingDiverged
from dist_train.runs.directory import RunDir

# These need another setting, more disk space or other weights, and their messages name the checkpoint themselves.
_SELF_EXPLANATORY = (ConfigError.__name__, CheckpointError.__name__, TrainingDiverged.__name__)


def is_self_explanatory(kind: str) -> bool:
    """Whether `resume_hint` adds nothing to an error of this class."""
    return kind in _SELF_EXPLANATORY


def resume_hint(run_dir: RunDir, nproc: int | None = None) -> str:
    """Return the hint, "" for a run that never made a step.

    `nproc` None: ranks on several machines or of a job, so the start command is unknown here.
    """
    newest = next(good_checkpoints(run_dir), None)
    if newest is None:
        return "There is no checkpoint yet." if run_dir.status.read().get("step") else ""
    resume = f"--resume {shlex.quote(str(run_dir.path))}"
    if nproc is None:
        return f"The last good checkpoint is {newest}. To resume, run the same command with {resume}"
    ranks = f" --nproc {nproc}" if nproc > 1 else ""
    return f"The last good checkpoint is {newest}. To resume: dist-train train {resume}{ranks}"
