"""What would fail hours later is refused before a job is queued."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from dist_train.config.batch_plan import BatchPlan
from dist_train.config.paths import default_data_root
from dist_train.config.schema import Config
from dist_train.errors import ConfigError, DataError
from dist_train.launch.slurm.batch_script import BatchScript
from dist_train.launch.slurm.commands import Partition

_TIME = re.compile(r"(?:(?P<d>\d+)-)?(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?")


def check_submission(script: BatchScript, config: Config, save_s: float = 0.0) -> None:
    """`save_s`: how long this run's last save took, where it has run before.

    Raises:
        ConfigError, DataError: with the setting, the arithmetic and the fix.
    """
    BatchPlan.fit(config.global_batch_size, config.per_device_batch_size, script.nodes * script.nproc)
    if (config.device == "cuda" or script.gpus_per_node) and script.gpus_per_node < script.nproc:
        raise ConfigError(
            f"{script.nproc} processes and {script.gpus_per_node} GPUs per node, with device={config.device}. "
            f"Ask for them with --gpus-per-node={script.nproc}."
        )
    limit_s = seconds_of(script.time)
    if limit_s <= script.lead_s + save_s:
        raise ConfigError(
            f"--time={script.time} is {limit_s} s, and the job is told to save --lead-s={script.lead_s} s before its "
            f"end (a save takes {save_s:.1f} s): it would train nothing. Ask for more time or lower --lead-s."
        )
    if save_s > script.lead_s:
        raise ConfigError(
            f"The last save of this run took {save_s:.0f} s, longer than --lead-s={script.lead_s}. Raise --lead-s."
        )
    folder = Path(script.log).parent
    if "%" not in str(folder) and not folder.is_dir():
        raise ConfigError(f"--log={script.log}: there is no folder {folder}, and Slurm makes none. mkdir -p {folder}")
    _check_data(config)


def check_partition(script: BatchScript, there: Mapping[str, Partition]) -> None:
    """Slurm queues a job that its partition can never run, and there it stays.

    Raises:
        ConfigError: no such partition, or more nodes, CPUs or time than it has.
    """
    default = [name for name, each in there.items() if each.is_default]
    names = script.partition.split(",") if script.partition else default
    unknown = [name for name in names if name not in there]
    if unknown:
        raise ConfigError(f"--partition={script.partition} does not exist. Use one of {', '.join(sorted(there))}.")
    if script.partition is None and any(option.startswith(("-p", "--partition")) for option in script.options):
        return  # sbatch itself knows
    cpus, asked_s = script.cpus_per_proc * script.nproc, seconds_of(script.time)
    refusals = []
    for name in names:
        has = there[name]
        if script.nodes > has.nodes:
            refusals.append(f"--nodes={script.nodes}, and partition {name} has {has.nodes}.")
        elif cpus > has.cpus:
            asked = f"--nproc={script.nproc} x --cpus-per-proc={script.cpus_per_proc} = {cpus} CPUs on a node"
            refusals.append(f"{asked}, and no node of partition {name} has more than {has.cpus}.")
        elif has.time_limit != "infinite" and asked_s > seconds_of(has.time_limit):
            refusals.append(f"--time={script.time}, and partition {name} ends jobs after {has.time_limit}.")
    if names and len(refusals) == len(names):
        raise ConfigError(f"{' '.join(refusals)} The job would wait for ever: ask for less.")


def _check_data(config: Config) -> None:
    from dist_train.data.sets.catalog import available_sets

    if config.data.bundle:
        return
    root = config.data.root or default_data_root()
    for found in available_sets(root):
        if found.name == config.data.name and not found.present:
            raise DataError(
                f"data.name={found.name} is not in {root}, and compute nodes often have no network. "
                f"Fetch it here first: dist-train data fetch {found.name} --root {root}"
            )


def seconds_of(time: str) -> int:
    """A time limit as sbatch reads it: minutes, minutes:seconds, H:M:S, days-H, days-H:M, days-H:M:S.

    Raises:
        ConfigError: it is none.
    """
    found = _TIME.fullmatch(time)
    if not found:
        raise ConfigError(f"--time={time} is no time limit. Write minutes, HH:MM:SS or D-HH.")
    first, second, third = (int(part or 0) for part in (found["a"], found["b"], found["c"]))
    if found["d"] is not None:
        return ((int(found["d"]) * 24 + first) * 60 + second) * 60 + third
    return (first * 60 + second) * 60 + third if found["c"] else first * 60 + second
