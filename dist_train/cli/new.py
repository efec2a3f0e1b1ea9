"""`new`."""

from __future__ import annotations

import click


@click.command()
@click.argument("name")
def new(name: str) -> None:
    """Create a folder with a config, net, data set, test and batch script of your own, which trains as it is."""
    from dist_train.tools.projects import create_project

    for path in create_project(name):
        click.echo(path)
    click.echo(f"cd {name} && dist-train train -c config.yaml")
