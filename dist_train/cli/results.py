"""What is done with a run afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import click

from dist_train.cli.options import end_rank


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--checkpoint", default="last", show_default=True, metavar="last|best|STEP")
@click.option("--split", default="test", show_default=True, type=click.Choice(["val", "test"]))
@click.option("--json", "as_json", is_flag=True, help="One line of JSON.")
def evaluate(run: Path, checkpoint: str, split: str, as_json: bool) -> None:
    """Loss and accuracy of a run's checkpoint, every example counted once. Any world size."""
    from dist_train.results import evaluate_run

    found = evaluate_run(run, checkpoint, split)
    if found is not None and as_json:
        click.echo(json.dumps(found))
    elif found is not None:
        click.echo(f"{run}, checkpoint at step {found['step']}, {split} split: {found['seen']} examples")
        for name in sorted(found.keys() - {"step", "seen"}):
            click.echo(f"{name} {found[name]:.6f}")
    end_rank()
