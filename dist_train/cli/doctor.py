"""`doctor`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from dist_train.cli.options import load, settings_options

if TYPE_CHECKING:
    from dist_train.tools.doctor import Row

_RANKS_OF_OURS = "DIST_TRAIN_DOCTOR"  # set for ranks that `doctor --nproc` starts: it reports what they found


@click.command()
@settings_options
@click.option("--nproc", default=1, show_default=True, type=click.IntRange(min=1), help="Processes that would train.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON.")
def doctor(nproc: int, as_json: bool, config_name: str | None, **options: tuple[str, ...]) -> None:
    """Check devices, versions, data, disk and network. Exit code 1, with the fix, if something is wrong.

    Under torchrun or srun it checks every rank and the network between them.
    """
    from dist_train.distributed.process_info import detect_process

    changes = (*options["overrides"], *options["settings"])
    in_world = detect_process(os.environ).world_size > 1
    rows: list[Row] | None
    if nproc > 1 and not in_world:
        rows = _start_and_examine(nproc, config_name or "mnist", changes)
    else:
        from dist_train.tools.doctor import examine_ranks

        rows = examine_ranks(load(config_name or "mnist", changes))
    if rows is not None:
        click.echo(json.dumps(rows) if as_json else _table(rows))
    wrong = any(row["fix"] for row in rows or ())
    if in_world:
        from dist_train.distributed.process_end import end_process

        end_process(0 if _RANKS_OF_OURS in os.environ else int(wrong))
    sys.exit(wrong)


def _start_and_examine(nproc: int, config_name: str, overrides: Sequence[str]) -> list[Row]:
    """Return what `nproc` ranks find that are started for it; this process imports no torch.

    Raises:
        LaunchError: They cannot be started.
    """
    from dist_train.distributed.process_info import threads_per_process
    from dist_train.launch.subprocesses import output_of_ranks

    arguments = ["-c", config_name, *(f"-o{override}" for override in overrides), "--json"]
    environment = {"OMP_NUM_THREADS": str(threads_per_process(nproc, os.environ)), _RANKS_OF_OURS: "1"}
    printed = output_of_ranks(nproc, "dist_train", "doctor", *arguments, environment=environment)
    rows: list[Row] = json.loads(printed.splitlines()[-1])
    return rows


def _table(rows: list[Row]) -> str:
    width = max(len(row["what"]) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"{'WRONG' if row['fix'] else 'ok':5}  {row['what'].ljust(width)}  {row['said']}")
        if row["fix"]:
            lines.append(f"{'':5}  {'':{width}}  {row['fix']}")
    return "\n".join(lines)
