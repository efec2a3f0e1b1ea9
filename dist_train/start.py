"""What a start of a run asks for besides its settings, where the run lies, and whether it may be started there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from dist_train.config import Config
from dist_train.environment import default_run_name
from dist_train.errors import RunDirError
from dist_train.run_dir import RunDir


@dataclass(frozen=True)
class Start:
    """What a start asks for besides the settings."""

    config_name: str
    run_name: str | None = None
    run_dir: Path | None = None  # told: by --resume DIR or by our launcher
    launched: bool = False  # by our launcher, which shows the error that we leave in the run directory
    resume: Literal["auto", "never"] = "auto"
    init_from: Path | None = None  # a run directory: start anew from its weights
    verbosity: int = 0  # -1 quiet, 0, 1 verbose


def find_run_dir(config: Config, start: Start) -> RunDir:
    """Where the run lies: as told, else as named, else by job, sweep or time."""
    if start.run_dir is not None:
        return RunDir(start.run_dir)
    name = start.run_name or default_run_name(start.config_name, os.environ, f"{datetime.now():%Y%m%d-%H%M%S}")
    return RunDir(parent_of_runs(config.runs_dir) / name)


def parent_of_runs(runs_dir: Path | None = None) -> Path:
    """Where run directories lie: as the settings say, else as DIST_TRAIN_RUNS_DIR does, else in `runs`."""
    return (runs_dir or Path(os.environ.get("DIST_TRAIN_RUNS_DIR") or "runs")).expanduser()


def check_start(run_dir: RunDir, config: Config, start: Start, *, create: bool = True) -> bool:
    """See that the run may be started there; True if it is finished already.

    Raises:
        ConfigError, RunDirError: it belongs to another config, is in use, cannot be written, or was to be new.
    """
    run_dir.check_config(config)
    if start.resume == "never" and run_dir.holds_checkpoints:
        raise RunDirError(
            f"{run_dir.path} holds checkpoints and --resume=never forbids to go on from them. Give the new run a name "
            f"of its own with --run-name, or leave --resume out."
        )
    if run_dir.read_status().get("state") == "FINISHED":
        return True
    if create:
        run_dir.create()
    return False
