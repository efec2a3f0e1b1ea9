"""Rank, world size and launcher of this process, from its environment: the only reader of RANK, SLURM_* and so on.

`dist_train` can be started by `python`, `torchrun` (also through `dist-train launch`), `accelerate launch` and
`srun`. A partial launcher environment is an error: guessing could train several independent single-process runs.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_train.errors import LaunchError

RUN_DIR = "DIST_TRAIN_RUN_DIR"  # our launcher -> its ranks: the run directory it chose
ASKED_AT = "DIST_TRAIN_ASKED_AT"  # our launcher -> its ranks: start time of the command, as time.perf_counter()
LAUNCHER_PID = "DIST_TRAIN_LAUNCHER_PID"  # our launcher -> its ranks: they end when this process dies
REQUEUED = "DIST_TRAIN_REQUEUED"  # launch/restart.sh -> our launcher: this run was started before

# Variables that identify one W&B run: code that starts several runs, or submits a job, does not pass them on.
OF_ONE_WANDB_RUN = ("WANDB_RUN_ID", "WANDB_NAME")

# Recorded in run.json and job.json, for a later start of the run. Never a key: others read the file.
RECORDED = (
    "CUDA_VISIBLE_DEVICES", "DIST_TRAIN_DATA_DIR", "DIST_TRAIN_RUNS_DIR", "OMP_NUM_THREADS", "PYTHONPATH",
    "WANDB_MODE", "WANDB_PROJECT",
)  # fmt: skip

_RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class ProcessInfo:
    """One process of a training: rank, world size and launcher."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    started_by: str = "python"  # python | torchrun | accelerate | srun


def detect_process(env: Mapping[str, str]) -> ProcessInfo:
    """Read rank and world size of this process from its environment.

    RANK is set: torchrun or accelerate. Else a Slurm step of several tasks: srun (a batch shell has SLURM_PROCID too,
    but no step, so the step id decides). Else a single process.

    Raises:
        LaunchError: a partial launcher environment, or a launcher that started one process instead of several.
    """
    if any(name in env for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return _from_rendezvous(env)
    if env.get("SLURM_STEP_ID") and _number(env, "SLURM_STEP_NUM_TASKS", 1) > 1:
        return _from_srun(env)
    if "ACCELERATE_MIXED_PRECISION" in env and "MASTER_ADDR" in env:
        # `accelerate launch --cpu --num_processes 2` and `distributed_type: MULTI_CPU` end up here (accelerate#2741).
        raise LaunchError(
            "accelerate launch was asked for several processes but started one: MASTER_ADDR is set, RANK is not. "
            "Use a config file of this project, for example by launch/accelerate.sh (launch/accelerate/cpu.yaml), "
            "or dist-train launch --nproc N."
        )
    return ProcessInfo(started_by="accelerate" if "ACCELERATE_MIXED_PRECISION" in env else "python")


def _from_rendezvous(env: Mapping[str, str]) -> ProcessInfo:
    env = {**env, **_infer_local_rank(env)}
    missing = [name for name in _RENDEZVOUS if not env.get(name)]
    if missing:
        present = [f"{name}={env[name]}" for name in _RENDEZVOUS if env.get(name)]
        raise LaunchError(
            f"Partial launcher environment: {' '.join(present)} but no {', '.join(missing)}. "
            + ("Set LOCAL_RANK, to 0 if each machine runs one process. " if missing == ["LOCAL_RANK"] else "")
            + "Start with dist-train launch, torchrun, accelerate launch or srun, or unset these variables."
        )
    rank, world_size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    if not 0 <= rank < world_size:
        raise LaunchError(f"RANK={rank} is not below WORLD_SIZE={world_size}. Let the launcher set both.")
    started_by = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "the environment"
    return ProcessInfo(
        rank=rank,
        local_rank=_number(env, "LOCAL_RANK"),
        world_size=world_size,
        local_world_size=_number(env, "LOCAL_WORLD_SIZE", world_size),
        started_by="accelerate" if "ACCELERATE_MIXED_PRECISION" in env else started_by,
    )


def _infer_local_rank(env: Mapping[str, str]) -> dict[str, str]:
    """Return LOCAL_RANK and LOCAL_WORLD_SIZE if only they are missing and the other variables determine them."""
    if env.get("LOCAL_RANK") or not all(env.get(name) for name in _RENDEZVOUS if name != "LOCAL_RANK"):
        return {}
    rank_and_size = rank, size = env["RANK"], env["WORLD_SIZE"]
    local_size = "1" if size == "1" else env.get("LOCAL_WORLD_SIZE")
    if env.get("SLURM_STEP_ID") and rank_and_size == (env.get("SLURM_PROCID"), env.get("SLURM_STEP_NUM_TASKS")):
        task = _from_srun(env)
        local = str(task.local_rank), str(task.local_world_size)
    elif rank_and_size == (env.get("OMPI_COMM_WORLD_RANK"), env.get("OMPI_COMM_WORLD_SIZE")):
        local = env.get("OMPI_COMM_WORLD_LOCAL_RANK", ""), env.get("OMPI_COMM_WORLD_LOCAL_SIZE", "")
    elif local_size == "1":
        local = "0", "1"
    elif local_size == size or env["MASTER_ADDR"] in ("localhost", "127.0.0.1", "::1"):
        local = rank, size
    else:
        return {}
    return dict(zip(("LOCAL_RANK", "LOCAL_WORLD_SIZE"), local, strict=True))


def _from_srun(env: Mapping[str, str]) -> ProcessInfo:
    world_size = _number(env, "SLURM_STEP_NUM_TASKS")
    tasks = _tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return ProcessInfo(
        rank=_number(env, "SLURM_PROCID"),
        local_rank=_number(env, "SLURM_LOCALID"),
        world_size=world_size,
        local_world_size=tasks[_number(env, "SLURM_NODEID")],
        started_by="srun",
    )


def _tasks_per_node(text: str) -> list[int]:
    """Parse "2(x3),1" to [2, 2, 2, 1]: nodes may have different numbers of tasks."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise LaunchError(f'SLURM_STEP_TASKS_PER_NODE="{text}" is not a list of numbers. Let srun set it.')
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def export_rendezvous(process: ProcessInfo, env: MutableMapping[str, str]) -> None:
    """Set the variables that torch.distributed and Accelerate read. An existing MASTER_ADDR or MASTER_PORT is kept."""
    if process.world_size == 1:
        return
    if process.started_by == "srun":
        one_node = process.local_world_size == process.world_size
        env.setdefault("MASTER_ADDR", "127.0.0.1" if one_node else first_host(env.get("SLURM_STEP_NODELIST", "")))
        # The port depends on job and step, so that jobs and steps that share a node use different ports.
        job, step = _number(env, "SLURM_JOB_ID"), _number(env, "SLURM_STEP_ID")
        env.setdefault("MASTER_PORT", str(20000 + (job * 31 + step) % 12000))
    env["RANK"], env["WORLD_SIZE"] = str(process.rank), str(process.world_size)
    env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"] = str(process.local_rank), str(process.local_world_size)


def first_host(nodelist: str) -> str:
    """Return the first host of a Slurm node list: gpu07 of "gpu[07-09,12],login1", rack1n3 of "rack[1-2]n[3-4]"."""
    match = re.match(r"[^\[,](?:[^\[,]|\[\d[^\]]*\])*", nodelist)
    if not match:
        raise LaunchError(f'No host in SLURM_STEP_NODELIST="{nodelist}". Set MASTER_ADDR to the host of rank 0.')
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", match[0])


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name) or ("" if default is None else str(default))
    try:
        return int(text)
    except ValueError:
        raise LaunchError(f'{name}="{text}" is not a number. Let the launcher set it.') from None


def available_cores() -> int:
    """Return the number of cores in the affinity of this process, which a scheduler may restrict."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def threads_per_process(processes: int, env: Mapping[str, str]) -> int:
    """Return OMP_NUM_THREADS (the first number of a list), else the available cores divided by `processes`."""
    explicit = re.match(r"\s*0*([1-9]\d*)", env.get("OMP_NUM_THREADS", ""))
    return int(explicit[1]) if explicit else max(1, available_cores() // processes)


def surroundings() -> dict[str, Any]:
    """Return the folder, the interpreter and the RECORDED variables of this process, for a later start."""
    return {
        "cwd": str(Path.cwd()),
        "python": sys.executable,
        "environment": {name: os.environ[name] for name in RECORDED if name in os.environ},
    }


def without_torchrun_options(env: Mapping[str, str]) -> dict[str, str]:
    """Return `env` without PET_* variables: torchrun reads PET_X as the default of --x, and we set all options."""
    return {name: value for name, value in env.items() if not name.startswith("PET_")}


def slurm_job(env: Mapping[str, str]) -> str | None:
    """Return the id of this Slurm job; for an array job with the task id, since the bare id may mean all tasks."""
    if env.get("SLURM_ARRAY_JOB_ID"):
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env.get('SLURM_ARRAY_TASK_ID', '0')}"
    return env.get("SLURM_JOB_ID") or None


def persistent_run_name(config_name: str, env: Mapping[str, str]) -> str | None:
    """Return a run name that is equal after a restart, or None.

    It is `<config>-<job id>` under Slurm, `<config>-<run id>` in a W&B sweep.
    """
    if env.get("WANDB_SWEEP_ID") and env.get("WANDB_RUN_ID"):
        return f"{config_name}-{env['WANDB_RUN_ID']}"
    return f"{config_name}-{job}" if (job := slurm_job(env)) else None
