"""A grid of runs: one for each combination of the listed values, identified by its name and trained once."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from dist_train.config.loading import listed, load_config
from dist_train.config.schema import Config
from dist_train.distributed.process_info import threads_per_process
from dist_train.errors import ConfigError
from dist_train.launch.subprocesses import Training, begin_train
from dist_train.runs.directory import RunDir
from dist_train.runs.start_options import check_run_name
from dist_train.runs.summary import Summary, summarise


@dataclass(frozen=True)
class Point:
    """One run of the grid."""

    name: str
    settings: tuple[str, ...]  # KEY=VALUE, without those common to all points
    config: Config = field(compare=False, repr=False)


@dataclass(frozen=True)
class Grid:
    name: str
    config_name: str
    common: tuple[str, ...]  # KEY=VALUE
    points: list[Point]

    @classmethod
    def of(cls, name: str, config_name: str, overrides: Sequence[str]) -> Grid:
        """Build a grid. `KEY=[A,B]` is an axis; if the setting is itself a list, only a list of lists is.

        Raises:
            ConfigError: a combination cannot be trained, or there is no axis. Nothing has been started.
        """
        fixed = [override for override in overrides if not listed(override)]
        axes = {override: items for override in overrides if (items := _axis(config_name, fixed, override))}
        if not axes:
            raise ConfigError("Nothing to sweep over. List the values of a setting: -o 'optimizer.lr=[1e-3,3e-3]'.")
        common = tuple(override for override in overrides if override not in axes)
        points: list[Point] = []
        for settings in itertools.product(*axes.values()):
            try:
                config = load_config(config_name, [*common, *settings])
            except ConfigError as error:
                raise ConfigError(f"{' '.join(settings)}: {error}") from None
            point = Point("-".join([name, *map(_as_name, settings)]), settings, config)
            if any(other.name == point.name for other in points):
                raise ConfigError(f"{' '.join(settings)}: another combination has the name {point.name} already.")
            points.append(point)
        return cls(name, config_name, common, points)

    def lines(self) -> list[str]:
        """Return one line of settings per run, for slurm/sweep_array.sbatch.

        Raises:
            ConfigError: a value contains a space, which ends a setting there.
        """
        for setting in itertools.chain.from_iterable(point.settings for point in self.points):
            if any(character.isspace() for character in setting):
                raise ConfigError(f'"{setting}": in a file of settings a space ends a value. Put it into the config.')
        return [" ".join(point.settings) for point in self.points]


def _axis(config_name: str, fixed: Sequence[str], override: str) -> list[str]:
    """Return the settings that a list expands to; empty if it is not a list, or is the value of a list setting."""
    items = listed(override)
    if items and _is_invalid(config_name, fixed, items[0]) and not _is_invalid(config_name, fixed, override):
        return []
    return items


def _is_invalid(config_name: str, fixed: Sequence[str], setting: str) -> bool:
    """Return whether the value itself is invalid, even if other settings are missing or conflict with it."""
    key = setting.partition("=")[0].strip()
    try:
        load_config(config_name, [*fixed, setting])
    except ConfigError as error:
        return any(line.startswith((f"{key}=", f"{key}.")) for line in str(error).splitlines())
    return False


def _as_name(setting: str) -> str:
    """Return the last part of the key, and the value, with characters replaced that a run's name may not have."""
    key, _, value = setting.partition("=")
    return "=".join(re.sub(r"[^\w.+-]", "_", part) for part in (key.rpartition(".")[2], value))


class Sweep:
    """Trains the unfinished runs of a grid, some at a time. On TERM or Ctrl-C they save and stop, and none starts."""

    def __init__(self, grid: Grid, folder: Path, *, jobs: int, nproc: int | None) -> None:
        """`folder` holds the run directories.

        Raises:
            ConfigError: a run exists already with other settings, or its name is invalid.
        """
        self.grid = grid
        self.runs = {point: RunDir(folder / point.name) for point in grid.points}
        self.stopped = False
        for point, run_dir in self.runs.items():
            check_run_name("--name", point.name, folder)
            try:
                run_dir.check_config(point.config)
            except ConfigError as error:
                raise ConfigError(str(error).replace("--run-name", "--name")) from None
        common = [f"-o{setting}" for setting in grid.common]
        self._arguments = ["-c", grid.config_name, *common, "--quiet", *([f"--nproc={nproc}"] if nproc else [])]
        self._jobs = jobs
        self._threads = threads_per_process(jobs * (nproc or 1), os.environ)
        self._training: dict[Point, Training] = {}

    def train(self, show: Callable[[Summary, bool], object]) -> list[Summary]:
        """Train until all runs end or a stop is requested. `show` gets each run at its start; with True, at its end."""
        waiting = [point for point in self.runs if self._summary(point).state != "FINISHED"]
        handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while self._training or (waiting and not self.stopped):
                while waiting and not self.stopped and len(self._training) < self._jobs:
                    self._start(point := waiting.pop(0))
                    show(self._summary(point), False)
                    if self.stopped:  # requested while this one was starting
                        self._training[point].send_signal(signal.SIGTERM)
                for point in [point for point, process in self._training.items() if process.poll() is not None]:
                    del self._training[point]
                    show(self._summary(point), True)
                time.sleep(0.1)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return [self._summary(point) for point in self.runs]

    def _start(self, point: Point) -> None:
        run_dir = self.runs[point]
        run_dir.create()
        settings = [f"-o{setting}" for setting in point.settings]
        group = point.config.tracking.group or self.grid.name
        path = [f"-oruns_dir={json.dumps(str(run_dir.path.parent))}", f"--run-name={point.name}"]
        arguments = [*self._arguments, *settings, *path]
        self._training[point] = begin_train(arguments, run_dir.logs / "sweep.log", self._threads, group)

    def _summary(self, point: Point) -> Summary:
        return summarise(self.runs[point].path)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self.stopped = True
        for process in self._training.values():
            process.send_signal(signal.SIGTERM)
