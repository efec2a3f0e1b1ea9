"""`train` and `launch`."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import Any

import click

from dist_train.cli.options import (
    STARTED,
    check_net_and_data,
    end_rank,
    start_options,
    train_arguments,
    try_option,
    try_out,
)
from dist_train.errors import ConfigError

_simulating = click.option(
    "--simulate-world-size", type=click.IntRange(1, 4096), metavar="N",
    help="Check shards and batches for N processes, without starting any.",
)  # fmt: skip


@click.command()
@start_options
@_simulating
@try_option
@click.option("--nproc", type=click.IntRange(min=1), metavar="N", help="Start N processes on this machine.")
def train(**options: Any) -> None:
    """Train a run, or continue it. Under torchrun, accelerate launch or srun, as one of its processes."""
    _train_or_launch(**options)


@click.command()
@start_options
@_simulating
@click.option("--nproc", type=click.IntRange(min=1), required=True, metavar="N", help="Processes on this machine.")
@click.option("--nnodes", metavar="N|MIN:MAX", show_default="1", help="Machines that train together.")
@click.option("--rdzv-endpoint", metavar="HOST[:PORT]", help="Where they meet: one of the machines, the same for all.")
@click.option(
    "--max-restarts",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    metavar="N",
    help="How often to restart all ranks from the last checkpoint after one failed.",
)
def launch(**options: Any) -> None:
    """Start N processes that train together; prints the torchrun line it runs.

    On several nodes: the same command on each, with --nnodes, --rdzv-endpoint and --run-name.
    """
    _train_or_launch(**options)


def _train_or_launch(
    nproc: int | None,
    simulate_world_size: int | None,
    dry_run: bool,
    tries: bool = False,
    nnodes: str | None = None,
    rdzv_endpoint: str | None = None,
    max_restarts: int = 0,
    **options: Any,
) -> None:
    from dist_train.config.batch_plan import BatchPlan
    from dist_train.config.loading import to_yaml
    from dist_train.distributed.gpu_driver import check_gpu_driver
    from dist_train.distributed.launcher_watch import watch_launcher
    from dist_train.distributed.process_info import LAUNCHER_PID, detect_process
    from dist_train.distributed.signals import StopRequest
    from dist_train.distributed.stdio import tolerate_closed_stdio
    from dist_train.launch import jobs
    from dist_train.launch.machines import find_nodes
    from dist_train.runs.start_options import find_run_dir

    tolerate_closed_stdio()
    process = detect_process(os.environ)
    request = StopRequest()
    if process.started_by in ("torchrun", "accelerate") or LAUNCHER_PID in os.environ:
        watch_launcher(lambda: request.request("INTERRUPT"))
    arguments = train_arguments(options)
    config, start = arguments.resolve(STARTED)
    if tries and not dry_run:
        raise ConfigError("--try trains nothing that is kept. Add --dry-run, or leave it out.")
    if simulate_world_size:
        from dist_train.tools.simulate import simulate

        for line in simulate(config, simulate_world_size):
            click.echo(line)
        return
    if nproc is not None and process.world_size > 1:
        raise ConfigError(f"--nproc={nproc} inside a world of {process.world_size} processes. Leave --nproc out.")
    check_gpu_driver(config.device)
    plan = BatchPlan.of(config, nproc or process.world_size)
    if dry_run:
        check_net_and_data(config)
        jobs.check(find_run_dir(config, start), config, start)
        click.echo(f"{to_yaml(config)}# {plan}")
    if tries:
        own = None if start.run_dir is None else str(start.run_dir / "config.yaml")
        try_out(replace(arguments, config_name=arguments.config_name or own, resume="auto", extend=None))
    if nproc is not None:
        nodes = find_nodes(nnodes, rdzv_endpoint, start.run_name, nproc, config)
        code = jobs.launch(
            config, start, arguments.of_a_rank(), nproc, nodes=nodes, max_restarts=max_restarts, dry_run=dry_run,
            say=click.echo,
        )  # fmt: skip
        sys.exit(code)
    if not dry_run:
        if arguments.fast_dev_run:
            os.environ["WANDB_MODE"] = "disabled"  # a value in the environment has priority over the settings
        jobs.train_here(config, start, request, STARTED)
        end_rank()
