"""`data ls|fetch`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import click


@click.group()
def data() -> None:
    """List data sets, or download one."""


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
