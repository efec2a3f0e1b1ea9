"""Options that several commands share."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from dist_train.config.schema import Config
    from dist_train.runs.train_arguments import TrainArguments


STARTED = time.perf_counter()  # of this process


class RunPath(click.Path):
    """The path of a run directory, or the name of a run in the folder of runs."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        from dist_train.runs.summary import find_run

        return find_run(Path(os.fsdecode(super().convert(value, param, ctx))))


def settings_options(command: Any) -> Any:
    """Add the options that define a config."""
    command = click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")(command)
    command = click.option(
        "-o", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting, e.g. -o optimizer.lr=3e-4."
    )(command)
    return click.option("-c", "--config", "config_name", metavar="FILE", help="A config file, or a bundled name.")(
        command
    )


def start_options(command: Any) -> Any:
    """Add the options of `train` and `launch`."""
    for option in (
        click.option("-v", "--verbose", is_flag=True),
        click.option("-q", "--quiet", is_flag=True, help="Warnings and errors only."),
        click.option("--fast-dev-run", is_flag=True, help="Five steps and one evaluation, without W&B."),
        click.option("--dry-run", is_flag=True, help="Print the settings and what would be started."),
        click.option("--run-name", metavar="N", help="Name of the run's directory."),
        click.option("--init-from", type=RunPath(), metavar="RUN", help="Start from the weights of this run."),
        click.option("--extend", metavar="TIME", help='Go on with a run, finished or not, to "5 epochs" in all.'),
        click.option(
            "--resume", default="auto", metavar="auto|never|DIR", show_default=True, is_flag=False, flag_value="auto",
            help="Whether to continue the run in its directory.",
        ),
    ):  # fmt: skip
        command = option(command)
    return settings_options(command)


try_option = click.option(
    "--try", "tries", is_flag=True, help="Also train five steps and evaluate, in a process of its own; keeps nothing."
)


def try_out(arguments: TrainArguments) -> None:
    """Try the settings of a start out, without the run that it continues."""
    from dist_train.launch.trial import try_batch

    try_batch(arguments)
    click.echo("tried: five steps and one evaluation went through, in one process")


def train_arguments(options: dict[str, Any]) -> TrainArguments:
    """Return those of `start_options` among a command's options."""
    from dist_train.runs.train_arguments import TrainArguments

    names = ("config_name", "resume", "run_name", "init_from", "extend", "fast_dev_run", "quiet", "verbose")
    overrides = (*options["overrides"], *options["settings"])
    return TrainArguments(overrides=overrides, **{name: options[name] for name in names})


def load(name: str | None, overrides: tuple[str, ...] = ()) -> Config:
    from dist_train.config.loading import load_config, missing_config

    if name is None:
        raise missing_config(overrides)
    return load_config(name, overrides)


def check_net_and_data(config: Config) -> None:
    """Check that net, data set, schedule and optimizer exist, without constructing net and data set."""
    from dist_train.data.splits import check_data_exists
    from dist_train.launch.jobs import check_optimizer
    from dist_train.models.registry import check_model_exists
    from dist_train.user_code.importing import check_object

    check_data_exists(config.data)
    check_model_exists(config.model)
    if ":" in config.schedule.name:
        check_object(config.schedule.name)
    check_optimizer(config)


def end_rank() -> None:
    """End the process if it is one of several ranks. Call it at the end of a command."""
    from dist_train.distributed.process_end import end_process
    from dist_train.distributed.process_info import detect_process

    if detect_process(os.environ).world_size > 1:
        end_process(0)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print at full width: rich would wrap at the width of the terminal, or at 80 in a pipe."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
