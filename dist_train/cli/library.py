"""`library ls|add|rm`: models, data loaders and data sets by name and version, as the page keeps them."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dist_train.cli.options import print_table

if TYPE_CHECKING:
    from dist_train.user_code.archives import Progress

_MEMORY_BYTES = 2 * 2**30  # for unpacking: two million names of files need 1.5
_EVERY_S = 0.2
_KINDS = ("models", "loaders", "datasets")
_kind = click.argument("kind", type=click.Choice(_KINDS))
_name = click.argument("name")


@click.group()
def library() -> None:
    """Keep models, data loaders and data sets by name and version."""


@library.command()
@click.argument("kind", type=click.Choice(_KINDS), required=False)
def ls(kind: str | None) -> None:
    """List what is there, with the path to name in a config."""
    from dist_train.user_code.library import Kind, entries

    kinds = [Kind(kind)] if kind else list(Kind)
    found = [version for each in kinds for entry in entries(each) for version in entry.versions]
    if not found:
        click.echo("There is nothing yet. Add a zip or a folder: dist-train library add models NAME PATH", err=True)
        return
    rows = [
        [each.kind, each.name, each.version, each.check.problems[0] if each.check.problems else each.check.summary,
         str(each.path)]
        for each in found
    ]  # fmt: skip
    print_table(["kind", "name", "version", "check", "path"], rows)


@library.command()
@_kind
@_name
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option("--weights", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
              help="Of a model: .pth, .safetensors, or a zip of model.pth.")  # fmt: skip
@click.option("--progress", "shows_progress", is_flag=True, hidden=True)
def add(kind: str, name: str, path: Path | None, weights: Path | None, shows_progress: bool) -> None:
    """Add a zip, which is unpacked, or a folder, which is linked. A data set without a path is empty.

    The code is checked by reading it: it is not run.
    """
    from dist_train.user_code.library import Kind, add_empty, add_folder, add_zip

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    if path is None and kind != Kind.DATASETS:
        raise click.UsageError("Name a zip or a folder.")
    if weights and kind != Kind.MODELS:
        raise click.UsageError("--weights is for models alone.")
    progress: Progress = _print_progress() if shows_progress else lambda *_: None
    if path is None:
        version = add_empty(name)
    elif path.is_dir():
        version = add_folder(Kind(kind), name, path.absolute(), weights=weights)
    else:
        version = add_zip(Kind(kind), name, path, weights=weights, progress=progress)
    click.echo(f"{version.kind}/{version.name} {version.version}: {version.check.summary}")
    for problem in version.check.problems:
        click.echo(problem)
    click.echo(version.path)


@library.command()
@_kind
@_name
@click.argument("version", required=False)
@click.option("--in", "folder", type=click.Path(path_type=Path), metavar="FOLDER", help="The folder of runs.")
def rm(kind: str, name: str, version: str | None, folder: Path | None) -> None:
    """Remove a version, or all of them, unless a run in FOLDER names it. Of a linked folder only the link goes."""
    from dist_train.config.paths import runs_root
    from dist_train.user_code.library import Kind, delete

    delete(Kind(kind), name, version, runs=folder or runs_root())


def _print_progress() -> Progress:
    """Return what prints "DONE TOTAL" in bytes, a few times a second."""
    printed = 0.0

    def show(done: int, total: int) -> None:
        nonlocal printed
        if time.monotonic() - printed >= _EVERY_S:
            printed = time.monotonic()
            click.echo(f"{done} {total}")

    return show
