"""`lr-find`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from dist_train.cli.options import check_net_and_data, load, settings_options
from dist_train.errors import ConfigError, RunDirError

_RATE = click.FloatRange(0, 1e6, min_open=True)


@click.command("lr-find")
@settings_options
@click.option("--nproc", default=1, show_default=True, type=click.IntRange(min=1), metavar="N", help="Processes.")
@click.option(
    "--low", default=1e-7, type=_RATE, show_default=True, metavar="LR", help="Learning rate of the first step."
)
@click.option(
    "--high", default=10.0, type=_RATE, show_default=True, metavar="LR", help="Learning rate of the last step."
)
@click.option("--steps", default=100, show_default=True, type=click.IntRange(10, 500), metavar="N",
              help="Steps of the test, at most one epoch.")  # fmt: skip
@click.option("--out", default="lr_find.png", show_default=True, type=click.Path(path_type=Path), metavar="FILE",
              help="The picture.")  # fmt: skip
def lr_find(
    config_name: str | None, overrides: tuple[str, ...], settings: tuple[str, ...], nproc: int, low: float,
    high: float, steps: int, out: Path,
) -> None:  # fmt: skip
    """Suggest a learning rate: raise it in one pass over the data, and find where the loss falls fastest.

    On the batches and processes of the run that the config describes. Makes no run: it leaves the picture only.
    """
    from dist_train.atomic_files import write_atomically
    from dist_train.distributed.process_info import detect_process
    from dist_train.runs.reports.charts import loss_by_rate
    from dist_train.runs.start_options import check_initial_weights
    from dist_train.tools.lr_find.range_test import RangeTest

    inside = detect_process(os.environ).world_size
    if inside > 1:
        raise ConfigError(f"lr-find starts its processes itself, and this is one of {inside}. Start it by itself.")
    config = load(config_name, (*overrides, *settings))
    check_net_and_data(config)
    check_initial_weights(config)
    curve = RangeTest(low, high, steps).run(config, nproc)
    end = ", where the loss diverged" if curve.has_diverged else ""
    click.echo(f"{len(curve.losses)} of {curve.steps} steps, up to a learning rate of {curve.rates[-1]:.2g}{end}")
    if curve.steepest is None:
        click.echo(f"no suggestion: the loss does not fall between {low:g} and {curve.rates[-1]:.2g}")
    else:
        optimizer = config.optimizer
        scaling = optimizer.scaled_lr(config.global_batch_size) / optimizer.lr
        click.echo(
            f"optimizer.lr={curve.steepest / scaling:.2g}: the loss falls fastest there, and is lowest at "
            f"{curve.lowest / scaling:.2g}; the config has {optimizer.lr:g}"
        )
    title = f"{Path(str(config_name)).stem}: loss while the learning rate rises"
    picture = loss_by_rate(curve.rates, curve.losses, curve.smoothed, curve.steepest, title)
    try:
        write_atomically(out, picture)
    except OSError as error:
        raise RunDirError(f"{out} cannot be written: {error.strerror}.") from None
    click.echo(f"written: {out}")
