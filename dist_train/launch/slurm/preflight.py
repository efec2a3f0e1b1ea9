"""Checks before a job is queued, for what would fail hours later."""

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
    """Check that the job can train and save. `save_s`: how long this run's last save took, if it has run before.

    Raises:
        ConfigError, DataError: it cannot; names the setting, the arithmetic and the fix.
    """
    BatchPlan.of(config, script.nodes * script.nproc)
    if (config.device == "cuda" or script.gpus_per_node) and script.gpus_per_node < script.nproc:
        raise ConfigError(
            f"{script.nproc} processes and {script.gpus_per_node} GPUs per node, with device={config.device}. "
            f"Request them with --gpus-per-node={script.nproc}."
        )
    limit_s = seconds_of(script.time)
    if limit_s <= script.lead_s + save_s:
        raise ConfigError(
            f"--time={script.time} is {limit_s} s, and the job is asked to save --lead-s={script.lead_s} s before its "
            f"end (a save takes {save_s:.1f} s): no time to train is left. Request more time or lower --lead-s."
        )
    if save_s > script.lead_s:
        raise ConfigError(
            f"The last save of this run took {save_s:.0f} s, longer than --lead-s={script.lead_s}. Raise --lead-s."
        )
    folder = Path(script.log).parent
    if "%" not in str(folder) and not folder.is_dir():
        raise ConfigError(f"--log={script.log}: no folder {folder}, and Slurm does not create it: mkdir -p {folder}")
    _check_data(config)


def check_partition(script: BatchScript, partitions: Mapping[str, Partition]) -> None:
    """Check that a partition can run the job. Slurm queues a job that none can run, and it waits forever.

    Raises:
        ConfigError: no such partition, or more nodes, CPUs or time than it has.
    """
    default = [name for name, each in partitions.items() if each.is_default]
    names = script.partition.split(",") if script.partition else default
    unknown = [name for name in names if name not in partitions]
    if unknown:
        raise ConfigError(f"--partition={script.partition} does not exist. Use one of {', '.join(sorted(partitions))}.")
    if script.partition is None and any(option.startswith(("-p", "--partition")) for option in script.options):
        return  # named in an sbatch option instead
    cpus, requested_s = script.cpus_per_proc * script.nproc, seconds_of(script.time)
    refusals = []
    for name in names:
        partition = partitions[name]
        if script.nodes > partition.nodes:
            refusals.append(f"--nodes={script.nodes}, but partition {name} has {partition.nodes}.")
        elif cpus > partition.cpus:
            requested = f"--nproc={script.nproc} x --cpus-per-proc={script.cpus_per_proc} = {cpus} CPUs on a node"
            refusals.append(f"{requested}, but no node of partition {name} has more than {partition.cpus}.")
        elif partition.time_limit != "infinite" and requested_s > seconds_of(partition.time_limit):
            refusals.append(f"--time={script.time}, but partition {name} ends jobs after {partition.time_limit}.")
    if names and len(refusals) == len(names):
        raise ConfigError(f"{' '.join(refusals)} The job would wait forever: request less.")


def _check_data(config: Config) -> None:
    from dist_train.data.sets.catalog import available_sets

    if config.data.bundle:
        return
    own_validation = [config.data.val_root] if config.data.val_root is not None else []
    for root in (config.data.root or default_data_root(), *own_validation):
        for dataset in available_sets(root):
            if dataset.name == config.data.name and not dataset.present:
                raise DataError(
                    f"data.name={dataset.name} is not in {root}, and compute nodes often have no network. "
                    f"Fetch it here first: dist-train data fetch {dataset.name} --root {root}"
                )


def seconds_of(time: str) -> int:
    """Parse a time limit as sbatch does: minutes, minutes:seconds, H:M:S, days-H, days-H:M, days-H:M:S.

    Raises:
        ConfigError: `time` is not a time limit.
    """
    match = _TIME.fullmatch(time)
    if not match:
        raise ConfigError(f"--time={time} is not a time limit. Write minutes, HH:MM:SS or D-HH.")
    first, second, third = (int(part or 0) for part in (match["a"], match["b"], match["c"]))
    if match["d"] is not None:
        return ((int(match["d"]) * 24 + first) * 60 + second) * 60 + third
    return (first * 60 + second) * 60 + third if match["c"] else first * 60 + second
