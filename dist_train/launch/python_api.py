"""Training from Python: `from dist_train import train` in a script or a notebook."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.config.batch_plan import BatchPlan
from dist_train.config.loading import to_yaml
from dist_train.config.paths import runs_root
from dist_train.config.schema import Config
from dist_train.distributed.gpu_driver import check_gpu_driver
from dist_train.distributed.process_info import detect_process
from dist_train.distributed.signals import StopRequest
from dist_train.errors import ConfigError, DistTrainError, LaunchError
from dist_train.launch import jobs
from dist_train.runs.directory import RunDir
from dist_train.runs.start_options import (
    StartOptions,
    check_initial_weights,
    check_run_name,
    remove_if_not_started,
    run_dir_by_time,
)

if TYPE_CHECKING:
    from torch import nn

_IN_USE = threading.Lock()  # torch's default dtype and Accelerate's state belong to the whole process


@dataclass(frozen=True)
class Result:
    """What a training has left."""

    run_dir: Path
    state: str  # FINISHED; INTERRUPT or PREEMPTED after a stop request: train again with the same run_name to continue
    metrics: Mapping[str, Any]  # as in result.json: test/accuracy, val/loss, train_s, ...; {} unless FINISHED

    @cached_property
    def net(self) -> nn.Module:
        """The trained net of the last checkpoint (averaged weights if the run keeps them), on the CPU in eval mode."""
        from dist_train.checkpoints.saved_net import SavedNet

        return SavedNet.find(self.run_dir, "last").build()


def train(config: Config, nproc: int = 1, *, run_name: str | None = None, extend: bool = False) -> Result:
    """Train a run to its end, or continue it, and return what it has left.

    With one process it trains in the calling one, from any thread, and leaves default dtype, number of threads,
    random generators, environment, logging and Python's signal handlers as they were. In the main thread, the first
    Ctrl-C asks the run to save and stop, a second one raises KeyboardInterrupt. With several, it starts them on this
    machine, as `dist-train launch` does; they import the user's classes by name from the current folder.

    Args:
        config: The settings: `load_config("mnist", ["train_for=2 epochs"])`.
        nproc: Number of processes.
        run_name: Name of the run's directory. A run of that name that is there and not finished is continued. None: a
            new one, named by the time.
        extend: Go on with the run of that name until `config.train_for`, also if it is finished.

    Raises:
        DistTrainError: As `dist-train train` reports it: ConfigError, DataError, UserCodeError, TrainingDiverged, ...;
            of a failed rank, with nproc > 1, LaunchError with its message.
    """
    _check_arguments(config, nproc, run_name, extend)
    if nproc == 1 and not _IN_USE.acquire(blocking=False):
        raise LaunchError("Another thread of this process is training. Wait for it, or pass nproc=2.")
    try:
        parent, name = runs_root(config.runs_dir), config.model.name.rpartition(":")[2]
        run_dir = RunDir(parent / run_name) if run_name else run_dir_by_time(parent, name, claim=True)
        start = StartOptions(config_name=name, run_dir=run_dir.path, extend=extend)
        try:
            _train_here(config, start) if nproc == 1 else _launch(config, start, nproc)
        except DistTrainError:
            if run_name is None:
                remove_if_not_started(run_dir, replace(start, run_dir=None))
            if run_name is None and nproc == 1 and not run_dir.status.path.exists():
                shutil.rmtree(run_dir.path, ignore_errors=True)  # the error came before the run had a record
            raise
    finally:
        if nproc == 1:
            _IN_USE.release()
    return Result(run_dir.path, run_dir.status.read().get("state", "INTERRUPT"), run_dir.read_result())


def _check_arguments(config: Config, nproc: int, run_name: str | None, extend: bool) -> None:
    """Refuse what cannot be trained here, before anything is written."""
    process = detect_process(os.environ)
    if process.world_size > 1:
        raise LaunchError(
            f"train() starts its processes itself, and this is rank {process.rank} of {process.world_size}. Call it in "
            f"a single process with nproc={process.world_size}, or start dist-train train under torchrun."
        )
    if nproc < 1:
        raise ConfigError(f"nproc={nproc} starts no process. Pass 1 or more.")
    if nproc > 1:
        _check_importable(config, nproc)
    check_gpu_driver(config.device)
    BatchPlan.of(config, nproc)
    if run_name is None and extend:
        raise ConfigError("extend=True names no run. Pass its run_name.")
    if run_name is None:
        check_initial_weights(config)
    else:
        check_run_name("run_name", run_name, runs_root(config.runs_dir))


def _check_importable(config: Config, nproc: int) -> None:
    for section in ("model", "data", "optimizer", "schedule"):
        setting, name = f"{section}.name", getattr(config, section).name
        if name.startswith("__main__:"):
            raise ConfigError(
                f"{setting}={name} and nproc={nproc}: other processes cannot import what is defined in this script or "
                f"notebook. Move it to a file, say mine.py, and name it mine:{name.partition(':')[2]}."
            )


def _train_here(config: Config, start: StartOptions) -> None:
    from dist_train.distributed import watchdog
    from dist_train.distributed.process_state import preserve_process_state

    with preserve_process_state(), watchdog.off():
        request = StopRequest(on_repeat=_interrupt)
        jobs.train_here(config, start, request, time.perf_counter())


def _interrupt(number: int) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def _launch(config: Config, start: StartOptions, nproc: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(to_yaml(config))
        extend = ("--extend", str(config.train_for)) if start.extend else ()
        code = jobs.launch(config, start, ("train", "-c", str(path), *extend), nproc, say=lambda _: None)
    if code > 128:
        raise KeyboardInterrupt(signal.Signals(code - 128).name)
