"""The command line. Commands import what they need when they run, so that `--help` needs neither torch nor pydantic."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dist_train import __version__
from dist_train.errors import ConfigError, DistTrainError

if TYPE_CHECKING:
    from dist_train.config import Config
    from dist_train.start import Start
    from dist_train.stop_request import StopRequest

_STARTED = time.perf_counter()


class _Reported(click.ClickException):
    """A DistTrainError as click shows it: one message, its exit code, no traceback."""

    def __init__(self, error: DistTrainError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code  # type: ignore[misc]

    def show(self, file: Any = None) -> None:
        rank = os.environ.get("RANK")
        click.echo(f"error{f' [rank {rank}]' if rank else ''}: {self.message}", file=file or sys.stderr)


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DistTrainError as error:
            raise _Reported(error) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="dist-train")
def main() -> None:
    """Data-parallel training whose numbers are exact and whose runs are not lost.

    A run is one config file: dist-train train -c mnist
    """
    # User code, package.module:Name, is looked up in the current folder first, however we are started.
    here = str(Path.cwd())
    if sys.path[:1] != [here]:
        sys.path.insert(0, here)


def _settings(command: Any) -> Any:
    """The options that make a config."""
    command = click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")(command)
    command = click.option(
        "-o", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting, e.g. -o optimizer.lr=3e-4."
    )(command)
    return click.option("-c", "--config", "config_name", metavar="FILE", help="A config file, or a bundled name.")(
        command
    )


def _starting(command: Any) -> Any:
    """The options of `train` and `launch`."""
    for option in (
        click.option("-v", "--verbose", is_flag=True),
        click.option("-q", "--quiet", is_flag=True, help="Warnings and errors only."),
        click.option("--fast-dev-run", is_flag=True, help="Five steps, one evaluation, no W&B: does it all work?"),
        click.option("--dry-run", is_flag=True, help="Print what would be started and with which settings."),
        click.option("--run-name", metavar="N", help="Name of the run's directory."),
        click.option("--init-from", type=click.Path(path_type=Path), metavar="RUN", help="Start from its weights."),
        click.option(
            "--resume", default="auto", metavar="auto|never|DIR", show_default=True,
            help="Continue what lies in the run directory.",
        ),
    ):  # fmt: skip
        command = option(command)
    return _settings(command)


@main.command()
@_starting
@click.option("--nproc", type=click.IntRange(min=1), metavar="N", help="Start N processes on this machine.")
def train(nproc: int | None, **options: Any) -> None:
    """Train, or continue, a run. Under torchrun, accelerate launch or srun: as one of its processes."""
    _train_or_launch(nproc, options)


@main.command()
@_starting
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
    _end_rank()


def _end_rank() -> None:
    from dist_train.distributed import end_process
    from dist_train.environment import find_place

    if find_place(os.environ).world_size > 1:
        end_process(0)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--checkpoint", default="last", show_default=True, metavar="last|best|STEP")
@click.option("--split", default="test", show_default=True, type=click.Choice(["val", "test"]))
@click.option("--json", "as_json", is_flag=True, help="One line of JSON.")
def evaluate(run: Path, checkpoint: str, split: str, as_json: bool) -> None:
    """Loss and accuracy of a run's checkpoint, every example counted once. Any world size."""
    from dist_train.results import evaluate_run

    found = evaluate_run(run, checkpoint, split)
    if found is not None and as_json:
        click.echo(json.dumps(found))
    elif found is not None:
        click.echo(f"{run}, checkpoint at step {found['step']}, {split} split: {found['seen']} examples")
        for name in sorted(found.keys() - {"step", "seen"}):
            click.echo(f"{name} {found[name]:.6f}")
    _end_rank()


_PARTS = ("speed", "scaling", "breakdown", "startup", "checkpoint", "growth", "speedrun")


@main.command()
@click.argument("parts", nargs=-1, type=click.Choice(_PARTS), metavar="[PART]...")
@click.option("--net", "nets", multiple=True, default=("mlp", "bks", "conv"), show_default=True, metavar="NET")
@click.option("--precision", "precisions", multiple=True, default=("no",), type=click.Choice(["no", "bf16"]))
@click.option("--batch-size", type=click.IntRange(min=1), help="Default: 64, of scaling 512.")
@click.option(
    "--steps", default=937, show_default=True, type=click.IntRange(min=1), help="Warm-up, then as many count."
)
@click.option("--nproc", "nprocs", multiple=True, default=(1, 2), show_default=True, type=int, help="Of scaling.")
@click.option("--repetitions", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("--out", default="bench", show_default=True, type=click.Path(path_type=Path), metavar="FOLDER")
def bench(parts: tuple[str, ...], out: Path, **options: Any) -> None:
    """Measure this harness beside the loops that people write: tables, JSON and pictures.

    Parts, all by default: speed, scaling, breakdown, startup, checkpoint, growth, speedrun (four seeds a
    repetition).
    """
    from dist_train.bench.suite import Options, run_part

    for part in parts or _PARTS:
        click.echo("\n".join([f"{part}:", *run_part(part, Options(**options), out), ""]))
    click.echo(f"written to {out}/")


@main.group()
def config() -> None:
    """Look at settings."""


@config.command("ls")
def config_ls() -> None:
    """The bundled configs."""
    from dist_train.config_file import bundled_configs

    for name, path in bundled_configs().items():
        title = next((line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.strip("# ")), "")
        click.echo(f"{name:20} {title}")


@config.command("show")
@_settings
def config_show(config_name: str, overrides: tuple[str, ...], settings: tuple[str, ...]) -> None:
    """The settings that result from a file and its overrides, defaults included."""
    from dist_train.config_file import to_yaml

    click.echo(to_yaml(_load(config_name, (*overrides, *settings))), nl=False)


@config.command("validate")
@_settings
@click.option("--nproc", type=click.IntRange(min=1), default=1, show_default=True, metavar="N")
def config_validate(config_name: str, overrides: tuple[str, ...], settings: tuple[str, ...], nproc: int) -> None:
    """Check a config, and that its batch can be shared out over N processes."""
    from dist_train.plan import BatchPlan

    found = _load(config_name, (*overrides, *settings))
    plan = BatchPlan.fit(found.global_batch_size, found.per_device_batch_size, nproc)
    click.echo(
        f"{config_name} is fine: global batch {plan.global_batch_size} = {plan.per_device_batch_size} per device "
        f"x {plan.grad_accum_steps} micro-steps x {plan.world_size} processes"
    )


@config.command("diff")
@click.argument("first")
@click.argument("second")
def config_diff(first: str, second: str) -> None:
    """The settings in which two configs (files, bundled names or run directories) differ."""
    mine, theirs = (
        _load(str(Path(name) / "config.yaml") if Path(name).is_dir() else name).flat() for name in (first, second)
    )
    for key in mine | theirs:  # a section that is not set has one entry, its own name
        if mine.get(key) != theirs.get(key):
            click.echo(f"{key}: {mine.get(key, '-')} | {theirs.get(key, '-')}")


def _load(name: str | None, overrides: tuple[str, ...] = ()) -> Config:
    from dist_train.config_file import load_config

    if name is None:
        raise ConfigError("No config. Name one with -c, for example -c mnist.")
    return load_config(name, overrides)


@main.group()
def data() -> None:
    """Look at data sets, or fetch one where there is network."""


@data.command("ls")
def data_ls() -> None:
    """The data sets by name and whether their files are here."""
    from dist_train.data import available_sets

    for found in available_sets():
        click.echo(f"{found.name:15} {'here' if found.present else '-':5} {found.path}  {found.note}")


@data.command("fetch")
@click.argument("name")
@click.option("--root", type=click.Path(path_type=Path), help="As data.root.")
@click.option("--split", help="As data.split (emnist).")
def data_fetch(name: str, root: Path | None, split: str | None) -> None:
    """Put a data set's files in place, for nodes without network."""
    from dist_train.config import default_data_root
    from dist_train.data import fetch

    fetch(name, root or default_data_root(), split)


if __name__ == "__main__":
    main()
