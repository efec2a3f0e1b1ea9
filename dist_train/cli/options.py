"""Options that several commands share, and what becomes of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dist_train.errors import ConfigError

if TYPE_CHECKING:
    from dist_train.config import Config


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
        click.option("--init-from", type=click.Path(path_type=Path), metavar="RUN", help="Start from its weights."),
        click.option(
            "--resume", default="auto", metavar="auto|never|DIR", show_default=True,
            help="Continue what lies in the run directory.",
        ),
    ):  # fmt: skip
        command = option(command)
    return settings_options(command)


def load(name: str | None, overrides: tuple[str, ...] = ()) -> Config:
    from dist_train.config_file import load_config

    if name is None:
        raise ConfigError("No config. Name one with -c, for example -c mnist.")
    return load_config(name, overrides)


def end_rank() -> None:
    """At the end of a command that may be one of several ranks."""
    from dist_train.distributed import end_process
    from dist_train.environment import find_place

    if find_place(os.environ).world_size > 1:
        end_process(0)
