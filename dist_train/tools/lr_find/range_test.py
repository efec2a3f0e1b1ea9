"""Start the ranks of a range test and read the curve that they print."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from dist_train.config.batch_plan import BatchPlan
from dist_train.config.loading import to_yaml
from dist_train.config.schema import Config
from dist_train.distributed.process_info import LAUNCHER_PID, threads_per_process
from dist_train.errors import ConfigError, LaunchError
from dist_train.launch.subprocesses import output_of, output_of_ranks
from dist_train.tools.lr_find.curve import Curve

_PROGRAM = "dist_train.tools.lr_find.rank"
CONFIG, ERROR = "config.yaml", "error"  # files that the ranks read, and write


@dataclass(frozen=True)
class RangeTest:
    low: float  # learning rate of the first step
    high: float  # of the last step
    steps: int  # at most; an epoch may have fewer

    def run(self, config: Config, nproc: int) -> Curve:
        """Raise the learning rate from `low` to `high`, on `nproc` processes of this machine.

        Raises:
            ConfigError: the range is empty, or the global batch cannot be divided among `nproc` processes.
            LaunchError: a rank failed; with its error.
        """
        if not self.low < self.high:
            raise ConfigError(f"--low={self.low:g} must be less than --high={self.high:g}.")
        BatchPlan.of(config, nproc)
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, CONFIG).write_text(to_yaml(config))
            program = _PROGRAM, json.dumps(asdict(self)), folder
            environment = {
                "OMP_NUM_THREADS": str(threads_per_process(nproc, os.environ)),
                LAUNCHER_PID: str(os.getpid()),
                "TMPDIR": folder,  # torchrun leaves files there
            }
            try:
                if nproc > 1:
                    printed = output_of_ranks(nproc, *program, environment=environment)
                else:
                    printed = output_of(*program, environment=environment)
            except LaunchError:
                error = Path(folder, ERROR)
                if not error.exists():
                    raise
                raise LaunchError(error.read_text()) from None
        # A user's net may print too.
        return Curve(**json.loads(next(line for line in printed.splitlines() if line.startswith('{"rates": '))))
