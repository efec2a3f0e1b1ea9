"""`bench`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

_PARTS = ("speed", "scaling", "breakdown", "startup", "checkpoint", "guards", "growth", "jpegs", "speedrun", "web")
_ON_A_GPU = ("gpu",)  # only if named


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice([*_PARTS, *_ON_A_GPU]), metavar="[PART]...")
@click.option("--net", "nets", multiple=True, default=("mlp", "bks", "conv"), show_default=True, metavar="NET")
@click.option("--precision", "precisions", multiple=True, default=("no",), type=click.Choice(["no", "bf16"]))
@click.option("--batch-size", type=click.IntRange(min=1), help="Default: 64, for scaling 512.")
@click.option(
    "--steps",
    default=937,
    show_default=True,
    type=click.IntRange(min=1),
    help="Steps of warm-up, and again as many measured steps.",
)
@click.option(
    "--nproc", "nprocs", multiple=True, default=(1, 2), show_default=True, type=int, help="World sizes of scaling."
)
@click.option("--repetitions", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("--out", default="bench", show_default=True, type=click.Path(path_type=Path), metavar="FOLDER")
def bench(parts: tuple[str, ...], out: Path, **options: Any) -> None:
    """Compare this harness with hand-written loops and other trainers: tables, JSON and pictures.

    Parts, all by default: speed, scaling, breakdown, startup, checkpoint, guards, growth, jpegs (a folder of them),
    speedrun (four seeds a repetition), web (the page of runs); and gpu, only if named. Before each measurement a line
    on stderr says what it is and about how long all will still take.
    """
    from dist_train.tools.bench.suite import Options, run

    names = tuple(dict.fromkeys(parts or _PARTS))
    say = partial(click.echo, err=True)
    for name, table in zip(names, run(names, Options(**options), out, say), strict=True):
        click.echo("\n".join([f"{name}:", *table, ""]))
    click.echo(f"written to {out}/")
