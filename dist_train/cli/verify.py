"""`verify`."""

from __future__ import annotations

import os
import sys

import click

from dist_train.cli.options import load, settings_options
from dist_train.errors import ConfigError


@click.command()
@settings_options
@click.option("--nproc", default=2, show_default=True, type=click.IntRange(min=1), help="Maximum number of processes.")
def verify(config_name: str | None, overrides: tuple[str, ...], settings: tuple[str, ...], nproc: int) -> None:
    """Check the promises on this machine for a config. Takes a few minutes; exit code 1 if one is broken.

    The same losses for any number of processes, exact resume, every example counted once, nothing lost
    by a kill.
    """
    from dist_train.distributed.process_info import detect_process
    from dist_train.tools.verify.suite import verify as checks

    inside = detect_process(os.environ).world_size
    if inside > 1:
        raise ConfigError(f"verify starts its processes itself, and this is one of {inside}. Start it by itself.")
    broken = 0
    for check in checks(load(config_name, (*overrides, *settings)), nproc):
        click.echo(f"{'pass' if check.kept else 'FAIL'}  {check.promise}: {check.result}")
        broken += not check.kept
    if broken:
        click.echo(f"{broken} promises broken.")
        sys.exit(1)
