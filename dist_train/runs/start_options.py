"""Options of a start that are not settings, the run directory that it uses, and whether it may start there."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

from dist_train.config.paths import runs_root
from dist_train.config.schema import Config
from dist_train.distributed.process_info import persistent_run_name
from dist_train.errors import ConfigError, DataError, RunDirError, UserCodeError
from dist_train.models.published_weights import is_published, published_file
from dist_train.runs.directory import RunDir
from dist_train.runs.summary import find_run, is_run

_NAME = re.compile(r"[A-Za-z0-9][\w.=+,-]*")
_MOST_BYTES = 220  # of a name: a file's has 255, and the bin puts the time before it
_FOR_NUMBER = 20  # of these are left free in a name that is made, for a number behind it
# Errors before the first step: the message says everything, so the run directory is not worth keeping.
_SETUP_ERRORS = (ConfigError.__name__, DataError.__name__, UserCodeError.__name__)


@dataclass(frozen=True)
class StartOptions:
    """Options of one start that are not settings."""

    config_name: str
    run_name: str | None = None
    run_dir: Path | None = None  # set by --resume DIR or by our launcher
    launched: bool = False  # by our launcher, which shows the error that the run leaves in its directory
    resume: Literal["auto", "never"] = "auto"
    init_from: Path | None = None  # a run directory: start a new run from its weights
    extend: bool = False  # a run with checkpoints may go on for longer, also if it is finished
    verbosity: int = 0  # -1 quiet, 0, 1 verbose
    # time.perf_counter() when the command was given. All processes of a machine share this clock.
    asked_at: float = field(default_factory=time.perf_counter)

    @property
    def init_from_text(self) -> str | None:
        """`init_from` as run.json records it."""
        return str(self.init_from.absolute()) if self.init_from is not None else None


def find_run_dir(config: Config, start: StartOptions, *, claim: bool = False) -> RunDir:
    """Return the run directory: the given one, else by run name, else by job or sweep, else by time.

    `claim`: create a directory that is named by time, so that no other start gets it.

    Raises:
        ConfigError: as `check_start`, for a directory that is claimed.
        RunDirError: the directory cannot be created.
    """
    if start.run_dir is not None:
        return RunDir(start.run_dir)
    own = valid_run_name(start.config_name)
    parent, name = runs_root(config.runs_dir), start.run_name or persistent_run_name(own, os.environ)
    former = persistent_run_name(start.config_name, os.environ)  # older versions accepted any name
    if start.run_name is None and former and os.path.isdir(parent / former):  # noqa: PTH112 - Path.is_dir may raise
        name = former
    if name is not None:
        return RunDir(parent / name)
    if claim:
        check_initial_weights(config)  # before there is a folder
    return run_dir_by_time(parent, own, claim=claim)


def run_dir_by_time(parent: Path, config_name: str, *, claim: bool) -> RunDir:
    """Return a new run directory that is named by the time; `claim` as in `find_run_dir`."""
    by_time = f"{valid_run_name(config_name)}-{datetime.now():%Y%m%d-%H%M%S}"
    suffixes = itertools.chain([""], map("-{}".format, itertools.count(2)))  # for starts within one second
    candidates = (RunDir(parent / f"{by_time}{suffix}") for suffix in suffixes)
    return next(run_dir for run_dir in candidates if not claim or run_dir.create(new=True))


def check_run_name(option: str, name: str, parent: Path) -> None:
    """Check the name of a new run. An existing run may have any name.

    Raises:
        ConfigError: a new run may not have this name.
    """
    is_valid = _NAME.fullmatch(name) and len(name.encode()) <= _MOST_BYTES
    if not is_valid and not os.path.isdir(parent / name):  # noqa: PTH112 - Path.is_dir may raise
        raise ConfigError(
            f"{option}={name!r}: a run name starts with a letter or a digit and contains only letters, digits and "
            f"_ . = + , -, at most {_MOST_BYTES} bytes. Use {valid_run_name(name)}."
        )


def valid_run_name(text: str) -> str:
    """Return a valid run name, as close to `text` as possible."""
    name = text if _NAME.fullmatch(text) else re.sub(r"[^\w.=+,-]+", "_", text).strip("_")
    name = name if _NAME.fullmatch(name) else f"run-{name}"
    return name.encode()[: _MOST_BYTES - _FOR_NUMBER].decode(errors="ignore")


def free_name(wanted: str, folder: Path) -> str:
    """Return a valid name close to `wanted`, with the first number behind it that no run in `folder` has."""
    stem = re.sub(r"(?<!\de)-\d+$", "", valid_run_name(wanted))  # lr1e-3 has no number behind it
    numbers = itertools.count(2 if is_taken(stem, folder) or is_taken(wanted, folder) else 1)
    return next(name for number in numbers if not is_taken(name := f"{stem}-{number}", folder))


def is_taken(name: str, folder: Path) -> bool:
    """Whether a run in `folder` has this name. False, not an error, for a name that no file can have."""
    return os.path.lexists(folder / name)


def check_start(run_dir: RunDir, config: Config, start: StartOptions, *, create: bool = True) -> bool:
    """Check that a start may use this run directory. Return True if the run is already finished, and not extended.

    Raises:
        ConfigError, RunDirError: the directory belongs to another config, cannot be written, or should have been new.
    """
    run_dir.check_config(config, extend=start.extend)
    if start.extend and not run_dir.holds_checkpoints:
        raise ConfigError(
            f"{run_dir.path} has no checkpoint, so there is no run to extend. To start one, set train_for instead: "
            f'-o train_for="{config.train_for}".'
        )
    if start.resume == "never" and run_dir.holds_checkpoints:
        raise RunDirError(
            f"{run_dir.path} holds checkpoints and --resume=never forbids resuming from them. Choose another "
            f"--run-name, or omit --resume."
        )
    if run_dir.status.read().get("state") == "FINISHED":
        return not (start.extend and run_dir.extension_to(config))
    if not run_dir.holds_checkpoints:
        check_initial_weights(config)
    if create:
        run_dir.create()
    return False


def check_initial_weights(config: Config) -> None:
    """Check that the file or the run of `model.weights` exists. Only a run without checkpoints needs it.

    Raises:
        ConfigError: there is no such file, no such run with a checkpoint, and no such file in the cache of torch.hub.
    """
    path = config.model.weights
    if path is None or os.path.isfile(file := os.path.expanduser(path)):  # noqa: PTH111,PTH113 - a Path may raise
        return
    if is_published(path):
        published_file(path)
        return
    run = find_run(Path(file))
    if not is_run(run):
        raise ConfigError(
            f"model.weights={path}: no such file. Give the path of a .safetensors or .pth file, or a run."
        )
    if not RunDir(run).holds_checkpoints:
        raise ConfigError(f"model.weights={path}: the run {run} has no checkpoint yet. Wait for one, or name a file.")


def is_not_worth_keeping(run_dir: RunDir, start: StartOptions) -> bool:
    """Whether a directory that is named by time holds only a start that failed before its first step.

    One with a chosen name stays: a batch script, `launch/restart.sh` or a sweep reads its error.json.
    """
    named = start.run_name or start.run_dir or persistent_run_name(start.config_name, os.environ)
    status, kind = run_dir.status.read(), run_dir.read_error().get("kind")
    begun = "step" in status or status.get("attempt", 1) > 1
    return not named and kind in _SETUP_ERRORS and not begun and not run_dir.holds_checkpoints


def remove_if_not_started(run_dir: RunDir, start: StartOptions) -> None:
    """After a failure, remove a directory that `is_not_worth_keeping`."""
    if is_not_worth_keeping(run_dir, start):
        doomed = run_dir.path.with_name(f".{run_dir.path.name}.removed")
        with suppress(OSError):
            run_dir.path.rename(doomed)  # at once: another rank may be about to write there
        shutil.rmtree(doomed, ignore_errors=True)
        if run_dir.path.absolute() == Path("runs").absolute() / run_dir.path.name:  # the folder that nobody chose
            with suppress(OSError):  # other runs are in it
                run_dir.path.parent.rmdir()
