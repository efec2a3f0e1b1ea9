"""The arguments of `dist-train train`: what they ask for, and how a rank is given them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dist_train.config.loading import load_config, missing_config
from dist_train.config.paths import runs_root
from dist_train.config.schema import Config
from dist_train.distributed.process_info import ASKED_AT, RUN_DIR
from dist_train.errors import ConfigError
from dist_train.runs.start_options import StartOptions, check_run_name
from dist_train.runs.summary import find_run


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """The arguments of `dist-train train`, as they were given."""

    config_name: str | None  # a file or a bundled name; None: that of the run to resume
    overrides: tuple[str, ...] = ()  # KEY=VALUE
    resume: str = "auto"  # auto, never, or a run's directory or name
    run_name: str | None = None
    init_from: Path | None = None
    extend: str | None = None  # a duration: train this long in all
    fast_dev_run: bool = False
    quiet: bool = False
    verbose: bool = False

    def resolve(self, started: float) -> tuple[Config, StartOptions]:
        """Return the settings and the options of the start. `started`: time.perf_counter() when the process began.

        Raises:
            ConfigError: There is no config, or it is wrong.
        """
        by_launcher = os.environ.get(RUN_DIR)
        folder, name = Path(by_launcher) if by_launcher else None, self.config_name
        if self.resume not in ("auto", "never"):
            folder = find_run(Path(self.resume))
            if self.run_name:
                raise ConfigError(f"--resume={folder} names the run already. Leave --run-name={self.run_name} out.")
            if not _holds_config(folder):
                raise ConfigError(
                    f"--resume={folder} has no config.yaml, so it is not a run. Use auto, never or a run directory."
                )
            name = name or str(folder / "config.yaml")
        if name is None:
            raise missing_config(self.overrides)
        longer = (f"train_for={self.extend}",) if self.extend is not None else ()
        config = load_config(name, [*self.overrides, *(_FAST_DEV_RUN if self.fast_dev_run else ()), *longer])
        if self.init_from is not None and config.model.weights is not None:
            raise ConfigError(
                f"--init-from={self.init_from} and model.weights={config.model.weights} both give the initial weights. "
                f"Leave one out (-o model.weights=null)."
            )
        if self.init_from is not None and not _holds_config(self.init_from):
            raise ConfigError(
                f"--init-from={self.init_from} has no config.yaml, so it is not a run. Give a run's name or "
                f"directory, or set model.weights=FILE for a file of weights."
            )
        if self.extend is not None and folder is None and self.run_name is None:
            raise ConfigError(f'--extend="{self.extend}" names no run. Add --resume=RUN.')
        if self.run_name is not None:
            check_run_name("--run-name", self.run_name, runs_root(config.runs_dir))
        return config, StartOptions(
            config_name=Path(name).stem + ("-dev" if self.fast_dev_run else ""),
            run_name=self.run_name,
            run_dir=folder,
            launched=by_launcher is not None,
            resume="never" if self.resume == "never" else "auto",
            init_from=self.init_from,
            extend=self.extend is not None,
            verbosity=-1 if self.quiet else int(self.verbose),
            asked_at=float(os.environ.get(ASKED_AT, started)),
        )

    def of_a_rank(self) -> tuple[str, ...]:
        """Return `train` and its arguments as each rank gets them; it learns the run directory from the environment."""
        arguments = ["train"]
        if self.config_name:
            arguments += ["-c", self.config_name]
        for override in self.overrides:
            arguments += ["-o", override]
        if self.resume != "auto":
            arguments.append(f"--resume={self.resume}")
        if self.init_from:
            arguments.append(f"--init-from={self.init_from}")
        if self.extend is not None:
            arguments.append(f"--extend={self.extend}")
        flags = {"--fast-dev-run": self.fast_dev_run, "--quiet": self.quiet, "--verbose": self.verbose}
        return (*arguments, *(flag for flag, is_set in flags.items() if is_set))


_FAST_DEV_RUN = (
    "train_for=5 steps", "log_every=1", "eval_every=0", "save_every=0", "final_train_eval=false",
    "tracking.wandb=disabled",
)  # fmt: skip


def _holds_config(folder: Path) -> bool:
    try:
        return (folder / "config.yaml").is_file()
    except OSError:  # the name is longer than any file's
        return False
