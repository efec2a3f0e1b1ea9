"""Traces of some steps of a run by torch.profiler: a file for each rank."""

from __future__ import annotations

import logging
import os

from torch.profiler import profile

from dist_train.atomic_files import remove
from dist_train.config.profiled_steps import ProfiledSteps
from dist_train.runs.directory import RunDir

_log = logging.getLogger(__name__)


class StepTrace:
    """Traces one rank during the given steps, and nothing else: it ends where the loop pauses and begins anew after it.

    An evaluation in a trace could make it larger than memory.
    """

    def __init__(self, steps: ProfiledSteps, run_dir: RunDir, rank: int) -> None:
        self._steps = steps
        self._folder = run_dir.profile
        self._rank = f"rank_{rank:05d}"
        self._first: int | None = None  # steps that were done before those since `begin`
        self._profiler: profile | None = None  # None also where an earlier attempt has traced them

    def turns_at(self, step: int) -> bool:
        """Whether a trace must begin or end now, after `step` steps. The same on every rank."""
        return (step in self._steps) != (self._first is not None)

    def begin(self, step: int) -> None:
        """Begin a trace if the next step is to be traced. The device must be idle."""
        if step not in self._steps:
            return
        self._first = step
        if not any(self._folder.glob(f"{self._rank}_steps_*-{self._steps.end}.json.gz")):
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler prints when it starts and stops
            os.environ.setdefault("TEARDOWN_CUPTI", "0")  # torch: after a teardown CUDA graphs may crash
            self._profiler = profile()
            self._profiler.start()

    def end(self, step: int) -> None:
        """End the trace, if there is one, and write its file. The device must be idle."""
        first, profiler = self._first, self._profiler
        self._first = self._profiler = None
        if profiler is None or first is None:
            return
        profiler.stop()
        if step > first:
            self._write(profiler, f"{self._rank}_steps_{first + 1}-{step}.json.gz")

    def _write(self, profiler: profile, name: str) -> None:
        path, aside = self._folder / name, self._folder / f".{name}"
        try:
            self._folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(aside))  # compressed, by the name
            aside.replace(path)
        except (OSError, RuntimeError) as error:  # RuntimeError is from torch's writer
            remove(aside)
            _log.warning("the trace %s cannot be written: %s", path, error)
        else:
            _log.info("trace: %s, %.2f MB", path, path.stat().st_size / 1e6)
