"""`config ls|show|validate|diff|reference`."""

from __future__ import annotations

from pathlib import Path

import click

from dist_train.cli.options import check_net_and_data, load, settings_options, try_option, try_out


@click.group()
def config() -> None:
    """Show and check settings."""


@config.command("ls")
def config_ls() -> None:
    """List the bundled configs."""
    from dist_train.config.loading import bundled_configs

    for name, path in bundled_configs().items():
        title = next((line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.strip("# ")), "")
        click.echo(f"{name:20} {title}")


@config.command("show")
@settings_options
def config_show(config_name: str, overrides: tuple[str, ...], settings: tuple[str, ...]) -> None:
    """Print the settings that result from a file and its overrides, defaults included."""
    from dist_train.config.loading import to_yaml

    click.echo(to_yaml(load(config_name, (*overrides, *settings))), nl=False)


@config.command("validate")
@settings_options
@click.option("--nproc", type=click.IntRange(min=1), default=1, show_default=True, metavar="N")
@try_option
def config_validate(
    config_name: str, overrides: tuple[str, ...], settings: tuple[str, ...], nproc: int, tries: bool
) -> None:
    """Check a config: its net and data set exist, and N processes can divide its batch."""
    from dist_train.config.batch_plan import BatchPlan
    from dist_train.runs.start_options import check_initial_weights
    from dist_train.runs.train_arguments import TrainArguments

    found = load(config_name, (*overrides, *settings))
    check_net_and_data(found)
    check_initial_weights(found)
    plan = BatchPlan.of(found, nproc)
    if tries:
        try_out(TrainArguments(config_name=config_name, overrides=(*overrides, *settings)))
    click.echo(f"{config_name} is fine: {plan.describe()}")


@config.command("diff")
@click.argument("first")
@click.argument("second")
def config_diff(first: str, second: str) -> None:
    """Print the settings in which two configs (files, bundled names or run directories) differ."""
    from dist_train.config.loading import differences

    mine, theirs = (
        load(str(Path(name) / "config.yaml") if Path(name).is_dir() else name).flat() for name in (first, second)
    )
    for key, (here, there) in differences(mine, theirs).items():
        click.echo(f"{key}: {here} | {there}")


@config.command("reference")
def config_reference() -> None:
    """Print every setting with its type, default and meaning, as Markdown (docs/settings.md)."""
    from dist_train.config.reference import to_markdown

    click.echo(to_markdown(), nl=False)
