"""`train` and `launch`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dist_train.cli.options import end_rank, start_options
from dist_train.errors import ConfigError

if TYPE_CHECKING:
    from dist_train.config import Config
    from dist_train.start import Start
    from dist_train.stop_request import StopRequest

_STARTED = time.perf_counter()


@click.command()
@start_options
@click.option("--nproc", type=click.IntRange(min=1), metavar="N", help="Start N processes on this machine.")
def train(nproc: int | None, **options: Any) -> None:
    """Train, or continue, a run. Under torchrun, accelerate launch or srun: as one of its processes."""
    _train_or_launch(nproc, options)


@click.command()
@start_options
@click.option("--nproc", type=click.IntRange(min=1), required=True, metavar="N", help="Processes on this machine.")
def launch(nproc: int, **options: Any) -> None:
    """Start N processes that train together; prints the torchrun line it runs."""
    _train_or_launch(nproc, options)


def _train_or_launch(nproc: int | None, options: dict[str, Any]) -> None:
    from dist_train.config_file import to_yaml
    from dist_train.environment import LAUNCHER_PID, find_place
    from dist_train.launch import watch_launcher
    from dist_train.plan import BatchPlan
    from dist_train.stop_request import StopRequest
    from dist_train.terminal import outlive_terminal

    outlive_terminal()
    place = find_place(os.environ)
    request = StopRequest()
    if place.started_by in ("torchrun", "accelerate") or LAUNCHER_PID in os.environ:
        watch_launcher(lambda: request.tell("INTERRUPT"))
    config, start = _resolve(options)
    if nproc is not None and place.world_size > 1:
        raise ConfigError(f"--nproc={nproc} inside a world of {place.world_size} processes. Leave --nproc out.")
    plan = BatchPlan.fit(config.global_batch_size, config.per_device_batch_size, nproc or place.world_size)
    if options["dry_run"]:
        click.echo(f"{to_yaml(config)}# {plan}")
    if nproc is not None:
        _launch(nproc, config, start, options)
    elif not options["dry_run"]:
        _train_here(config, start, request)


def _resolve(options: dict[str, Any]) -> tuple[Config, Start]:
    from dist_train.config_file import load_config
    from dist_train.environment import RUN_DIR
    from dist_train.start import Start

    resume, name = options["resume"], options["config_name"]
    told = os.environ.get(RUN_DIR)
    folder = Path(told) if told else None
    if resume not in ("auto", "never"):
        folder = Path(resume)
        if options["run_name"]:
            raise ConfigError(f"--resume={folder} names the run already. Leave --run-name={options['run_name']} out.")
        if not (folder / "config.yaml").is_file():
            raise ConfigError(
                f"--resume={folder} has no config.yaml, so it is no run. Use auto, never or a run's folder."
            )
        name = name or str(folder / "config.yaml")
    if name is None:
        raise ConfigError("No config. Name one, for example -c mnist; dist-train config ls lists the bundled ones.")
    overrides = [*options["overrides"], *options["settings"]]
    if options["fast_dev_run"]:
        overrides += [
            "train_for=5 steps", "log_every=1", "eval_every=0", "save_every=0", "final_train_eval=false",
            "tracking.wandb=disabled",
        ]  # fmt: skip
    start = Start(
        config_name=Path(name).stem + ("-dev" if options["fast_dev_run"] else ""),
        run_name=options["run_name"],
        run_dir=folder,
        launched=told is not None,
        resume="never" if resume == "never" else "auto",
        init_from=options["init_from"],
        verbosity=-1 if options["quiet"] else int(options["verbose"]),
    )
    return load_config(name, overrides), start


def _launch(nproc: int, config: Config, start: Start, options: dict[str, Any]) -> None:
    """Everything that can be refused is refused here, before any process starts."""
    from dist_train.launch import LaunchSpec, start_ranks
    from dist_train.start import check_start, find_run_dir

    run_dir = find_run_dir(config, start)
    finished = check_start(run_dir, config, start, create=not options["dry_run"])
    spec = LaunchSpec(arguments=_arguments_of_ranks(options), run_dir=run_dir, nproc=nproc)
    click.echo(str(spec))
    if options["dry_run"]:
        return
    if finished:
        click.echo(f"{run_dir.path} is finished already: nothing to do.")
        return
    run_dir.lock()  # in use? then say so before any process starts
    run_dir.unlock()
    sys.exit(start_ranks(spec))


def _arguments_of_ranks(options: dict[str, Any]) -> tuple[str, ...]:
    """`train` as each rank gets it; the run directory comes by environment."""
    arguments = ["train"]
    if options["config_name"]:
        arguments += ["-c", options["config_name"]]
    for override in (*options["overrides"], *options["settings"]):
        arguments += ["-o", override]
    if options["resume"] != "auto":
        arguments.append(f"--resume={options['resume']}")
    if options["init_from"]:
        arguments.append(f"--init-from={options['init_from']}")
    flags = ("fast_dev_run", "quiet", "verbose")
    return (*arguments, *(f"--{name.replace('_', '-')}" for name in flags if options[name]))


def _train_here(config: Config, start: Start, request: StopRequest) -> None:
    from dist_train.attempt import run_attempt

    with request:
        run_attempt(config, start, request, _STARTED)
    end_rank()
