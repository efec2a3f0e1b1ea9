"""`wandb sync`."""

from __future__ import annotations

from pathlib import Path

import click

from dist_train.cli.options import RunPath


@click.group()
def wandb() -> None:
    """Upload W&B runs recorded on this machine."""


@wandb.command()
@click.argument("runs", nargs=-1, required=True, type=RunPath())
def sync(runs: tuple[Path, ...]) -> None:
    """Upload what W&B has not received of these runs, recorded offline or interrupted while online."""
    from dist_train.runs.directory import RunDir
    from dist_train.training.tracking import sync as send

    send([RunDir(run) for run in runs])
