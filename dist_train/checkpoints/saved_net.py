"""The net of a checkpoint, rebuilt from what its run has recorded: settings, properties of the data, weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from dist_train.checkpoints.manifest import find_checkpoint
from dist_train.checkpoints.storage import load_weights
from dist_train.config.loading import load_config
from dist_train.config.schema import Config
from dist_train.data.splits import load_splits
from dist_train.distributed.devices import default_dtype
from dist_train.errors import CheckpointError
from dist_train.models.registry import build_model
from dist_train.runs.directory import RunDir


@dataclass(frozen=True)
class SavedNet:
    """A checkpoint with what else its net is built from."""

    run_dir: RunDir
    config: Config
    folder: Path  # the checkpoint

    @classmethod
    def find(cls, path: Path, which: str) -> SavedNet:
        """Find checkpoint `which` (last, best or a step) of a run.

        Raises:
            CheckpointError: the run or checkpoint does not exist.
        """
        run_dir = RunDir(path)
        if not run_dir.config.is_file():
            raise CheckpointError(f"{path} has no config.yaml, so it is not a run. Give a run directory.")
        return cls(run_dir, load_config(str(run_dir.config)), find_checkpoint(run_dir, which))

    @cached_property
    def data(self) -> Mapping[str, Any]:
        """The properties of the run's data, as `Splits.description`."""
        # Runs of older versions did not record them.
        return self.run_dir.read_provenance().get("data") or load_splits(self.config.data, self.config.seed).description

    def build(self) -> nn.Module:
        """Build the net as the run's ranks did, and load its weights: on the CPU, in the run's dtype, in eval mode.

        Raises:
            DistTrainError: as `build_model` and `load_weights`.
        """
        spec = {name: self.data[name] for name in ("in_channels", "num_classes", "image_size")}
        with default_dtype(self.config):
            net = build_model(self.config.model, spec, self.config.seed)
        load_weights(net, self.folder)
        return net.eval()
