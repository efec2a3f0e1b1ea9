"""What can go wrong, and how the command line reports it.

DistTrainError
  ConfigError       settings wrong or at odds                      exit 2
  DataError         data set missing or not as expected            exit 1
  LaunchError       processes cannot be started, or a lone world   exit 1
    PeerLost        another rank is gone: killed, or its node    exit 1
  RunDirError       run directory in use, unwritable, not shared   exit 1
  CheckpointError   cannot be written or read                      exit 1
  TrainingDiverged  the loss is not finite                         exit 1
  OutOfMemory       of the device, or of the machine               exit 1
  UserCodeError     a bundle or a class of the user does not fit   exit 1

A message is one or a few lines: the setting as the user typed it, the arithmetic, and the fix last.
"""

from __future__ import annotations


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
