"""The command line. Commands import what they need when they run, so that `--help` needs neither torch nor pydantic."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from dist_train import __version__
from dist_train.cli.bench import bench
from dist_train.cli.config import config
from dist_train.cli.data import data
from dist_train.cli.doctor import doctor
from dist_train.cli.library import library
from dist_train.cli.lr_find import lr_find
from dist_train.cli.new import new
from dist_train.cli.queue import queue
from dist_train.cli.results import evaluate, export, predict
from dist_train.cli.runs import runs
from dist_train.cli.slurm import slurm
from dist_train.cli.sweep import sweep
from dist_train.cli.tracking import wandb
from dist_train.cli.train import launch, train
from dist_train.cli.verify import verify
from dist_train.cli.web import web
from dist_train.errors import ConfigError, DistTrainError


class _Reported(click.ClickException):
    """A DistTrainError as click shows it: one message, its exit code, no traceback."""

    def __init__(self, error: DistTrainError) -> None:
        super().__init__("\n".join([str(error), *getattr(error, "__notes__", [])]))
        self.exit_code = error.exit_code  # type: ignore[misc]

    def show(self, file: Any = None) -> None:
        rank = os.environ.get("RANK")
        click.echo(f"error{f' [rank {rank}]' if rank else ''}: {self.message}", file=file or sys.stderr)


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.NoSuchOption as error:
            if error.ctx is None or not any(option.name == "overrides" for option in error.ctx.command.params):
                raise
            from dist_train.config.mistakes import option_meant

            hint = option_meant(error.option_name) or f" {error.ctx.command_path} --help lists all."
            raise _Reported(ConfigError(f"No option {error.option_name}.{hint}")) from error
        except DistTrainError as error:
            raise _Reported(error) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="dist-train")
def main() -> None:
    """Data-parallel training whose numbers are exact and whose runs are not lost.

    A run is one config file: dist-train train -c mnist
    """
    # User code, package.module:Name, is looked up in the current folder first, however we are started.
    here = str(Path.cwd())
    if sys.path[:1] != [here]:
        sys.path.insert(0, here)


for _command in (
    train,
    launch,
    evaluate,
    predict,
    export,
    runs,
    web,
    sweep,
    queue,
    slurm,
    wandb,
    lr_find,
    verify,
    doctor,
    bench,
    config,
    data,
    library,
    new,
):
    main.add_command(_command)
