"""Options that several commands share, and what becomes of them."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dist_train.errors import ConfigError

if TYPE_CHECKING:
    from dist_train.config.schema import Config
    from dist_train.runs.start_options import StartOptions


STARTED = time.perf_counter()  # this process


class RunPath(click.Path):
    """A run's directory, or the name of one that lies where runs do."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return find_run(Path(os.fsdecode(super().convert(value, param, ctx))))


def find_run(path: Path) -> Path:
    from dist_train.config.paths import runs_root
    from dist_train.runs.summary import is_run

    named = runs_root() / path
    return named if not is_run(path) and is_run(named) else path


def settings_options(command: Any) -> Any:
    """The options that make a config."""
    command = click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")(command)
    command = click.option(
        "-o", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting, e.g. -o optimizer.lr=3e-4."
    )(command)
    return click.option("-c", "--config", "config_name", metavar="FILE", help="A config file, or a bundled name.")(
        command
    )


def start_options(command: Any) -> Any:
    """The options of `train` and `launch`."""
    for option in (
        click.option("-v", "--verbose", is_flag=True),
        click.option("-q", "--quiet", is_flag=True, help="Warnings and errors only."),
        click.option("--fast-dev-run", is_flag=True, help="Five steps, one evaluation, no W&B: does it all work?"),
        click.option("--dry-run", is_flag=True, help="Print what would be started and with which settings."),
        click.option("--run-name", metavar="N", help="Name of the run's directory."),
        click.option("--init-from", type=RunPath(), metavar="RUN", help="Start from its weights."),
        click.option(
            "--resume", default="auto", metavar="auto|never|DIR", show_default=True,
            help="Continue what lies in the run directory.",
        ),
    ):  # fmt: skip
        command = option(command)
    return settings_options(command)


def resolve(options: dict[str, Any]) -> tuple[Config, StartOptions]:
    """What the options of `train` ask for.

    Raises:
        ConfigError: no config, or one that is wrong.
    """
    from dist_train.config.loading import load_config
    from dist_train.config.paths import runs_root
    from dist_train.distributed.process import ASKED_AT, RUN_DIR
    from dist_train.runs.start_options import StartOptions, check_run_name

    resume, name = options["resume"], options["config_name"]
    told = os.environ.get(RUN_DIR)
    folder = Path(told) if told else None
    if resume not in ("auto", "never"):
        folder = find_run(Path(resume))
        if options["run_name"]:
            raise ConfigError(f"--resume={folder} names the run already. Leave --run-name={options['run_name']} out.")
        if not _holds_config(folder):
            raise ConfigError(
                f"--resume={folder} has no config.yaml, so it is no run. Use auto, never or a run's folder."
            )
        name = name or str(folder / "config.yaml")
    if name is None:
        raise ConfigError("No config. Name one, for example -c mnist; dist-train config ls lists the bundled ones.")
    overrides = [*options["overrides"], *options["settings"]]
    if options["fast_dev_run"]:
        overrides += [
            "train_for=5 steps", "log_every=1", "eval_every=0", "save_every=0", "final_train_eval=false",
            "tracking.wandb=disabled",
        ]  # fmt: skip
    start = StartOptions(
        config_name=Path(name).stem + ("-dev" if options["fast_dev_run"] else ""),
        run_name=options["run_name"],
        run_dir=folder,
        launched=told is not None,
        resume="never" if resume == "never" else "auto",
        init_from=options["init_from"],
        verbosity=-1 if options["quiet"] else int(options["verbose"]),
        asked_at=float(os.environ.get(ASKED_AT, STARTED)),
    )
    config = load_config(name, overrides)
    if start.run_name is not None:
        check_run_name("--run-name", start.run_name, runs_root(config.runs_dir))
    return config, start


def _holds_config(folder: Path) -> bool:
    try:
        return (folder / "config.yaml").is_file()
    except OSError:  # a name longer than any file's
        return False


def arguments_of_train(options: dict[str, Any]) -> tuple[str, ...]:
    """`train` as each rank gets it; the run directory comes by environment."""
    arguments = ["train"]
    if options["config_name"]:
        arguments += ["-c", options["config_name"]]
    for override in (*options["overrides"], *options["settings"]):
        arguments += ["-o", override]
    if options["resume"] != "auto":
        arguments.append(f"--resume={options['resume']}")
    if options["init_from"]:
        arguments.append(f"--init-from={options['init_from']}")
    flags = ("fast_dev_run", "quiet", "verbose")
    return (*arguments, *(f"--{name.replace('_', '-')}" for name in flags if options[name]))


def load(name: str | None, overrides: tuple[str, ...] = ()) -> Config:
    from dist_train.config.loading import load_config

    if name is None:
        raise ConfigError("No config. Name one with -c, for example -c mnist.")
    return load_config(name, overrides)


def look_up(config: Config) -> None:
    """See that net and data set are there, without making them."""
    from dist_train.data.splits import check_data_exists
    from dist_train.models.registry import check_model_exists

    check_data_exists(config.data)
    check_model_exists(config.model)


def end_rank() -> None:
    """At the end of a command that may be one of several ranks."""
    from dist_train.distributed.process import detect_process
    from dist_train.distributed.world import end_process

    if detect_process(os.environ).world_size > 1:
        end_process(0)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """As wide as it is: rich would fold it at the width of the terminal, or at 80 in a pipe."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
