"""`doctor`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from dist_train.cli.options import load, settings_options

if TYPE_CHECKING:
    from dist_train.config.schema import Config
    from dist_train.tools.doctor import Diagnosis

RANKS_OF_OURS = "DIST_TRAIN_DOCTOR"  # set for the ranks that `--nproc` starts: it reports what they found
_MEET_S = 60  # ranks that do not meet within so long do not meet


@click.command()
@settings_options
@click.option("--nproc", default=1, show_default=True, type=click.IntRange(min=1), help="Processes that would train.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON.")
def doctor(nproc: int, as_json: bool, config_name: str | None, **options: tuple[str, ...]) -> None:
    """Is everything there that a run needs? Exit code 1, and the fix, where something is wrong.

    Under torchrun or srun it looks at every rank and at the network between them.
    """
    from dist_train.distributed.process import detect_process, threads_per_process
    from dist_train.launch.subprocesses import output_of_ranks

    changes = (*options["overrides"], *options["settings"])
    if nproc > 1 and detect_process(os.environ).world_size == 1:
        again = ["-c", config_name or "mnist", *(f"-o{override}" for override in changes), "--json"]
        environment = {"OMP_NUM_THREADS": str(threads_per_process(nproc, os.environ)), RANKS_OF_OURS: "1"}
        said = output_of_ranks(nproc, "dist_train", "doctor", *again, environment=environment)
        rows = json.loads(said.splitlines()[-1])
    else:
        rows = _examine(load(config_name or "mnist", changes))
    if rows is not None:
        click.echo(json.dumps(rows) if as_json else _table(rows))
    wrong = any(row["fix"] for row in rows or ())
    if detect_process(os.environ).world_size > 1:
        from dist_train.distributed.world import end_process

        end_process(0 if RANKS_OF_OURS in os.environ else int(wrong))
    sys.exit(wrong)


def _examine(config: Config) -> list[dict[str, str]] | None:
    """What all ranks found, on rank zero; of the others only what is wrong there."""
    from dist_train.config.paths import runs_root
    from dist_train.distributed.world import World
    from dist_train.errors import DistTrainError
    from dist_train.tools.doctor import Diagnosis, examine, exchange

    runs_dir = runs_root(config.runs_dir)
    mine = [*examine(config, runs_dir)]
    try:
        world = World.join(config.model_copy(update={"setup_timeout_s": _MEET_S}))
        mine.append(exchange(world))
        world.check_shared(runs_dir.absolute())
    except (DistTrainError, RuntimeError) as error:  # the latter by gloo and NCCL
        return _rows([*mine, Diagnosis("ranks", "do not meet, or not as they should", str(error))])
    of_all = world.gather(_rows(mine))
    hosts = world.hosts()
    wrong = [
        row | {"name": f"{row['name']}, rank {rank} on {hosts[rank]}"}
        for rank, rows in enumerate(of_all) if rank for row in rows if row["fix"]
    ]  # fmt: skip
    world.leave()
    return [*of_all[0], *wrong] if world.is_rank_zero else None


def _rows(findings: list[Diagnosis]) -> list[dict[str, str]]:
    return [asdict(finding) for finding in findings]


def _table(rows: list[dict[str, str]]) -> str:
    width = max(len(row["name"]) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"{'WRONG' if row['fix'] else 'ok':5}  {row['name'].ljust(width)}  {row['result']}")
        if row["fix"]:
            lines.append(f"{'':5}  {'':{width}}  {row['fix']}")
    return "\n".join(lines)
