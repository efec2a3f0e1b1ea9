"""The exceptions of dist_train and the exit codes of the command line.

DistTrainError
  ConfigError       a setting is invalid, or two contradict           exit 2
  DataError         a data set is missing or not as expected          exit 1
  LaunchError       processes cannot start or cannot form one group   exit 1
    PeerLost        another rank is gone: it or its node died         exit 1
  RunDirError       run directory in use, not writable, not shared    exit 1
  CheckpointError   a checkpoint cannot be written or read            exit 1
  TrainingDiverged  the loss is not finite                            exit 1
  OutOfMemory       the device or the machine is out of memory        exit 1
  UserCodeError     user code fails or lacks the expected interface   exit 1
  LibraryError      a model or data set cannot be kept, or is in use  exit 1

A message has one or a few lines: the setting as the user typed it, the arithmetic, and the fix last.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DistTrainError(Exception):
    exit_code = 1


class ConfigError(DistTrainError):
    exit_code = 2


class DataError(DistTrainError):
    pass


class LaunchError(DistTrainError):
    pass


class PeerLost(LaunchError):
    pass


class RunDirError(DistTrainError):
    pass


class CheckpointError(DistTrainError):
    pass


class TrainingDiverged(DistTrainError):
    pass


class OutOfMemory(DistTrainError):
    pass


class UserCodeError(DistTrainError):
    pass


class LibraryError(DistTrainError):
    pass


def did_you_mean(word: str, names: Iterable[str], prefix: str = "") -> str:
    """Return " Did you mean PREFIXname?" for the name most similar to `word`, or "" if none is similar."""
    near = nearest(word, names)
    return f" Did you mean {prefix}{near}?" if near else ""


def nearest(word: str, names: Iterable[str]) -> str:
    """Return the name most similar to `word`, whatever their case, or "" if none is similar."""
    lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(word.lower(), list(lower), n=1, cutoff=0.5)
    return lower[near[0]] if near else ""
