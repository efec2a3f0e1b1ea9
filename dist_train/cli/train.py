"""`train` and `launch`."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import click

from dist_train.cli.options import STARTED, arguments_of_train, end_rank, look_up, resolve, start_options
from dist_train.errors import ConfigError, DistTrainError

if TYPE_CHECKING:
    from dist_train.config.schema import Config
    from dist_train.distributed.signals import StopRequest
    from dist_train.launch.machines import Nodes
    from dist_train.runs.start_options import StartOptions

_simulating = click.option(
    "--simulate-world-size", type=click.IntRange(1, 4096), metavar="N",
    help="Check shards and batches as of N processes, and start nothing.",
)  # fmt: skip


@click.command()
@start_options
@_simulating
@click.option("--nproc", type=click.IntRange(min=1), metavar="N", help="Start N processes on this machine.")
def train(nproc: int | None, **options: Any) -> None:
    """Train, or continue, a run. Under torchrun, accelerate launch or srun: as one of its processes."""
    _train_or_launch(nproc, options)


@click.command()
@start_options
@_simulating
@click.option("--nproc", type=click.IntRange(min=1), required=True, metavar="N", help="Processes on this machine.")
@click.option("--nnodes", metavar="N|MIN:MAX", show_default="1", help="Machines that train together.")
@click.option("--rdzv-endpoint", metavar="HOST[:PORT]", help="Where they meet: one of them, the same for all.")
@click.option(
    "--max-restarts",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    metavar="N",
    help="Start all ranks again after one failed, from the last checkpoint, so many times.",
)
def launch(nproc: int, **options: Any) -> None:
    """Start N processes that train together; prints the torchrun line it runs.

    On several nodes: the same command on each, with --nnodes, --rdzv-endpoint and --run-name.
    """
    _train_or_launch(nproc, options)


def _train_or_launch(nproc: int | None, options: dict[str, Any]) -> None:
    from dist_train.config.batch_plan import BatchPlan
    from dist_train.config.loading import to_yaml
    from dist_train.distributed.parent import watch_launcher
    from dist_train.distributed.process import LAUNCHER_PID, detect_process
    from dist_train.distributed.signals import StopRequest
    from dist_train.distributed.stdio import tolerate_closed_stdio

    tolerate_closed_stdio()
    place = detect_process(os.environ)
    request = StopRequest()
    if place.started_by in ("torchrun", "accelerate") or LAUNCHER_PID in os.environ:
        watch_launcher(lambda: request.request("INTERRUPT"))
    config, start = resolve(options)
    if options["simulate_world_size"]:
        from dist_train.tools.simulate import simulate

        for line in simulate(config, options["simulate_world_size"]):
            click.echo(line)
        return
    if nproc is not None and place.world_size > 1:
        raise ConfigError(f"--nproc={nproc} inside a world of {place.world_size} processes. Leave --nproc out.")
    plan = BatchPlan.fit(config.global_batch_size, config.per_device_batch_size, nproc or place.world_size)
    if options["dry_run"]:
        look_up(config)
        click.echo(f"{to_yaml(config)}# {plan}")
    if nproc is not None:
        _launch(nproc, config, start, options)
    elif not options["dry_run"]:
        if options["fast_dev_run"]:
            os.environ["WANDB_MODE"] = "disabled"  # where it is set it would win over the settings
        _train_here(config, start, request)


def _launch(nproc: int, config: Config, start: StartOptions, options: dict[str, Any]) -> None:
    """Everything that can be refused is refused here, before any process starts."""
    from dist_train.launch.machines import stop_run_to_rejoin
    from dist_train.launch.torchrun import LaunchSpec, start_ranks
    from dist_train.runs.start_options import check_start, find_run_dir, remove_if_not_started

    nodes = _nodes(options, nproc, config)
    run_dir = find_run_dir(config, start, claim=not options["dry_run"])
    finished = check_start(run_dir, config, start, create=not options["dry_run"])
    spec = LaunchSpec(
        arguments=arguments_of_train(options),
        run_dir=run_dir,
        asked_at=start.asked_at,
        nproc=nproc,
        nodes=nodes,
        max_restarts=options.get("max_restarts", 0),
    )
    if nodes is not None and nodes.at_least < nodes.at_most and not options["dry_run"]:
        stop_run_to_rejoin(run_dir)
    click.echo(str(spec))
    if options["dry_run"]:
        return
    if finished:
        click.echo(f"{run_dir.path} is finished already: nothing to do.")
        return
    if nodes is None:
        run_dir.lock()  # in use? then say so before any process starts
        run_dir.unlock()
    try:
        code = start_ranks(spec)
    except DistTrainError:
        remove_if_not_started(run_dir, start)
        raise
    sys.exit(code)


def _nodes(options: dict[str, Any], nproc: int, config: Config) -> Nodes | None:
    """The machines of `launch --nnodes`, None for this one alone. Every number of them is checked that may come up."""
    from dist_train.config.batch_plan import BatchPlan
    from dist_train.launch.machines import Nodes

    text, endpoint = options.get("nnodes"), options.get("rdzv_endpoint")
    outside = os.environ.get("PET_NNODES") or "1"
    if text is None and outside not in ("1", "1:1"):
        raise ConfigError(
            f"PET_NNODES={outside} from outside asks torchrun for several machines. Start with launch "
            f"--nnodes={outside} --rdzv-endpoint={os.environ.get('PET_MASTER_ADDR') or 'HOST'}, or unset PET_NNODES to "
            f"train on this machine alone."
        )
    text = text or "1"
    if text == "1" and endpoint is None:
        return None
    if endpoint is None or not options["run_name"]:
        raise ConfigError(
            f"--nnodes={text} needs --rdzv-endpoint=HOST, where the machines meet, and --run-name=N, so that they "
            f"train one run: give both, the same on each."
        )
    nodes = Nodes.parse(text, endpoint, config.setup_timeout_s)
    for number in range(nodes.at_least, nodes.at_most + 1):
        BatchPlan.fit(config.global_batch_size, config.per_device_batch_size, number * nproc)
    return nodes


def _train_here(config: Config, start: StartOptions, request: StopRequest) -> None:
    from dist_train.launch.slurm.preemption import Slurm
    from dist_train.training.run import run_training

    request.preempt_signal = signal.Signals[f"SIG{config.preempt_signal}"]
    with request:
        run_training(config, start, request, STARTED, Slurm(os.environ))
    end_rank()
