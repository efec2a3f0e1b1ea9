"""The room that checkpoints need on the disk."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from torch import Tensor, nn

from dist_train.config.schema import Config
from dist_train.errors import RunDirError
from dist_train.runs.directory import RunDir

AT_ONCE = 2  # at least: a checkpoint is deleted only after the next one is written

# Tensors of a parameter's size that an optimizer keeps for each, and those that an option adds.
_STATE = {"adam": 2, "adamw": 2, "sgd": 0, "adadelta": 2, "rmsprop": 1}
_STATE_OF_OTHERS = 2  # as most have
_ADDED_BY = ("momentum", "amsgrad", "centered")
_MIB = 2**20


@dataclass(frozen=True)
class CheckpointSize:
    """Bytes of one checkpoint, but for some kilobytes of names and numbers."""

    weights: int  # with buffers
    optimizer: int
    averaging: int = 0  # with ema_decay, training.pt holds the raw weights and the average besides

    @classmethod
    def of(cls, net: nn.Module, config: Config) -> CheckpointSize:
        """Compute the size for a net that is in the run's dtype."""
        weights = sum(value.nbytes for value in net.state_dict().values() if isinstance(value, Tensor))
        frozen_later_trained = config.model.freeze_until is not None
        trained = sum(each.nbytes for each in net.parameters() if each.requires_grad or frozen_later_trained)
        added = sum(bool(getattr(config.optimizer, name)) for name in _ADDED_BY)
        copies = _STATE.get(config.optimizer.name, _STATE_OF_OTHERS) + added
        return cls(weights, copies * trained, 2 * weights if config.ema_decay else 0)

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.averaging

    def __str__(self) -> str:
        """ "9.4 MiB (3.1 weights + 6.3 optimizer state)"."""
        parts = {"weights": self.weights, "optimizer state": self.optimizer, "averaging": self.averaging}
        shown = " + ".join(f"{size / _MIB:.1f} {name}" for name, size in parts.items() if size)
        return f"{self.total / _MIB:.1f} MiB ({shown})"

    def times(self, count: int) -> str:
        """ "2 x 9.4 MiB (3.1 weights + 6.3 optimizer state) = 18.8 MiB"."""
        return f"{count} x {self} = {count * self.total / _MIB:.1f} MiB"


def check_room(run_dir: RunDir, size: CheckpointSize) -> None:
    """Check that a checkpoint fits on the disk beside the one that it replaces, which a resumed run has already.

    Raises:
        RunDirError: names the needed and the free space.
    """
    count = max(1, AT_ONCE - len(run_dir.step_folders()))
    free = shutil.disk_usage(run_dir.path).free
    if free < count * size.total:
        raise RunDirError(
            f"Checkpoints need {size.times(count)}, as one is deleted only after the next is written, and "
            f"{run_dir.path} has {free / _MIB:.1f} MiB free. Make room, or choose another location with runs_dir or "
            f"DIST_TRAIN_RUNS_DIR."
        )
