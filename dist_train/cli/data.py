"""`data ls|fetch|prepare`."""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from dist_train.config.data import Decoder


@click.group()
def data() -> None:
    """List data sets, download one, or decode a folder of images once."""


@data.command("ls")
def data_ls() -> None:
    """List the named data sets and whether their files are on this machine."""
    from dist_train.data.sets.catalog import available_sets

    for found in available_sets():
        click.echo(f"{found.name:15} {'here' if found.present else '-':5} {found.path}  {found.note}")


@data.command("fetch")
@click.argument("name")
@click.option("--root", type=click.Path(path_type=Path), help="As data.root.")
@click.option("--split", help="As data.split (emnist).")
def data_fetch(name: str, root: Path | None, split: str | None) -> None:
    """Download a data set, for later use on nodes without network."""
    from dist_train.config.paths import default_data_root
    from dist_train.data.sets.catalog import SETS
    from dist_train.data.sets.download import fetch

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    root = root or default_data_root()
    folder = fetch(name, root, split, progress=True)
    sizes = [path.stat().st_size for path in SETS[name].files(root, split)]
    click.echo(f"{name} is in {folder}: {len(sizes)} files, {sum(sizes) / 1e6:,.1f} MB")


@data.command("prepare")
@click.argument("root", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--image-size", type=click.IntRange(min=1), required=True, help="As data.image_size.")
@click.option(
    "--decoder", type=click.Choice(["pil", "simplejpeg"]), default="pil", show_default=True, help="As data.decoder."
)
def data_prepare(root: Path, out: Path, image_size: int, decoder: Decoder) -> None:
    """Decode the image folder ROOT once into the new folder OUT, which trains as data.root=OUT without decoding."""
    from dist_train.data.sets.preparation import prepare

    with click.progressbar(length=1, label="decoding", show_pos=True, file=sys.stderr) as bar:

        def advance(total: int) -> None:
            bar.length = total
            bar.update(1)

        num_bytes = prepare(root.absolute(), out.absolute(), image_size, decoder, advance)
    quoted = shlex.quote(str(out.absolute()))
    settings = f"data.name=image_folder data.root={quoted} data.image_size={image_size} data.decoder={decoder}"
    click.echo(f"{out} holds {num_bytes / 1e6:,.1f} MB of pixels. Train with: {settings}")
