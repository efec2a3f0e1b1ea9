"""What a start of a run asks for besides its settings, where the run lies, and whether it may be started there."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

from dist_train.config.paths import runs_root
from dist_train.config.schema import Config
from dist_train.distributed.process import persistent_run_name
from dist_train.errors import ConfigError, DataError, RunDirError, UserCodeError
from dist_train.runs.directory import RunDir

_NAME = re.compile(r"[A-Za-z0-9][\w.=+,-]*")
# Of a start that never came as far as its set-up: there is nothing to look at but the message.
_SAY_ALL = (ConfigError.__name__, DataError.__name__, UserCodeError.__name__)


@dataclass(frozen=True)
class StartOptions:
    """What a start asks for besides the settings."""

    config_name: str
    run_name: str | None = None
    run_dir: Path | None = None  # told: by --resume DIR or by our launcher
    launched: bool = False  # by our launcher, which shows the error that we leave in the run directory
    resume: Literal["auto", "never"] = "auto"
    init_from: Path | None = None  # a run directory: start anew from its weights
    verbosity: int = 0  # -1 quiet, 0, 1 verbose
    # time.perf_counter(), which the processes of a machine share, when the command was given.
    asked_at: float = field(default_factory=time.perf_counter)


def find_run_dir(config: Config, start: StartOptions, *, claim: bool = False) -> RunDir:
    """Where the run lies: as told, else as named, else by job or sweep, else by time.

    `claim`: one that is named by time is made, and is no other start's.

    Raises:
        RunDirError: it cannot be made.
    """
    if start.run_dir is not None:
        return RunDir(start.run_dir)
    own = valid_run_name(start.config_name)
    parent, name = runs_root(config.runs_dir), start.run_name or persistent_run_name(own, os.environ)
    former = persistent_run_name(start.config_name, os.environ)  # of a version that took any name
    if start.run_name is None and former and os.path.isdir(parent / former):  # noqa: PTH112 - Path.is_dir may raise
        name = former
    if name is not None:
        return RunDir(parent / name)
    by_time = f"{own}-{datetime.now():%Y%m%d-%H%M%S}"
    suffixes = itertools.chain([""], map("-{}".format, itertools.count(2)))  # of starts within one second
    candidates = (RunDir(parent / f"{by_time}{suffix}") for suffix in suffixes)
    return next(run_dir for run_dir in candidates if not claim or run_dir.create(new=True))


def check_run_name(option: str, name: str, parent: Path) -> None:
    """A run that is there may have any name.

    Raises:
        ConfigError: a new one may not have this.
    """
    if not _NAME.fullmatch(name) and not os.path.isdir(parent / name):  # noqa: PTH112 - Path.is_dir may raise
        raise ConfigError(
            f"{option}={name!r}: a run's name begins with a letter or a digit and goes on with those and with _ . = + "
            f", -. Call it {valid_run_name(name)}."
        )


def valid_run_name(text: str) -> str:
    """What a run may be called, as near to `text` as it can be."""
    fitting = text if _NAME.fullmatch(text) else re.sub(r"[^\w.=+,-]+", "_", text).strip("_")
    return fitting if _NAME.fullmatch(fitting) else f"run-{fitting}"


def check_start(run_dir: RunDir, config: Config, start: StartOptions, *, create: bool = True) -> bool:
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


def remove_if_not_started(run_dir: RunDir, start: StartOptions) -> None:
    """After a failure: a folder that is named by time and whose only start ended before its set-up says nothing.

    One that somebody named stays: a batch script, `launch/restart.sh` or a sweep reads its error.json.
    """
    named = start.run_name or start.run_dir or persistent_run_name(start.config_name, os.environ)
    status, kind = run_dir.read_status(), run_dir.read_error().get("kind")
    begun = "resumed_at" in status or status.get("attempt", 1) > 1 or run_dir.holds_checkpoints
    if not named and kind in _SAY_ALL and not begun:
        shutil.rmtree(run_dir.path, ignore_errors=True)
