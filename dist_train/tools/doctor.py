"""Check that this machine has what a run needs: one diagnosis per item, with a fix if something is wrong."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch
from filelock import FileLock

from dist_train.atomic_files import write_atomically
from dist_train.checkpoints.disk_space import AT_ONCE, CheckpointSize
from dist_train.checkpoints.initial_weights import load_initial_weights
from dist_train.config.paths import runs_root
from dist_train.config.schema import Config
from dist_train.data.sets.image_set import num_examples
from dist_train.data.splits import load_splits
from dist_train.distributed.devices import choose_device, default_dtype
from dist_train.distributed.process_info import available_cores, detect_process, threads_per_process
from dist_train.distributed.world import World, backends
from dist_train.errors import DistTrainError, LaunchError
from dist_train.launch.slurm.commands import installed_version
from dist_train.models.freezing import Frozen
from dist_train.models.registry import build_model
from dist_train.training.provenance import cpu_model, version_of
from dist_train.training.tracking import wandb_mode

_MIB = 2**20
_REDUCED = 16 * _MIB  # bytes of the timed all-reduce
_SLOW_S = 1.0  # for a file to be written and synced


Row = dict[str, str]  # what, said, fix: as `dist-train doctor --json` prints them

_MEET_S = 60  # ranks that do not meet within so long do not meet


@dataclass(frozen=True)
class Diagnosis:
    name: str
    result: str
    fix: str = ""  # not empty: something is wrong

    @property
    def row(self) -> Row:
        return {"what": self.name, "said": self.result, "fix": self.fix}


def examine(config: Config, runs_dir: Path) -> Iterator[Diagnosis]:
    """Run the checks that need only one process."""
    yield _device(config)
    yield _threads()
    yield _versions()
    size = CheckpointSize(0, 0)
    try:
        splits = load_splits(config.data, config.seed, detect_process(os.environ).local_world_size)
        counted = f"{num_examples(splits.train):,} training examples, validation on {splits.val_source}"
        yield Diagnosis("data", f"{config.data.bundle or config.data.name}: {counted}")
        with default_dtype(config):
            net = build_model(config.model, splits.input_spec, config.seed)
        if config.model.weights is not None and detect_process(os.environ).rank == 0:
            load_initial_weights(net, config.model.weights)
        Frozen(net, config.model.freeze)
        size = CheckpointSize.of(net, config)
        parameters = f"{sum(p.numel() for p in net.parameters()):,} parameters"
        name = config.model.bundle or config.model.name
        yield Diagnosis("net", f"{name}: {parameters}, a checkpoint takes {size}")
    except DistTrainError as error:
        yield Diagnosis("data and net", "not available as configured", str(error))
    yield _port()
    yield from _folder(runs_dir, size)
    yield _wandb(config)
    yield _slurm()


def examine_ranks(config: Config) -> list[Row] | None:
    """Return what all ranks found, on rank zero; of the others only what is wrong there. None on other ranks.

    Collective: every rank must call this.
    """
    runs_dir = runs_root(config.runs_dir)
    mine = [*examine(config, runs_dir)]
    try:
        world = World.join(config.model_copy(update={"setup_timeout_s": _MEET_S}))
        mine.append(exchange(world))
        world.check_shared(runs_dir.absolute())
    except (DistTrainError, RuntimeError) as error:  # the latter by gloo and NCCL
        return [each.row for each in [*mine, Diagnosis("ranks", "do not meet, or not as they should", str(error))]]
    of_all = world.gather([each.row for each in mine])
    hosts = world.hosts()
    wrong = [
        row | {"what": f"{row['what']}, rank {rank} on {hosts[rank]}"}
        for rank, rows in enumerate(of_all) if rank for row in rows if row["fix"]
    ]  # fmt: skip
    world.leave()
    return [*of_all[0], *wrong] if world.is_rank_zero else None


def exchange(world: World) -> Diagnosis:
    """Time an all-reduce between all ranks.

    Collective: every rank must call this.
    """
    if world.size == 1:
        return Diagnosis("all-reduce", "one process: nothing to reduce (try --nproc)")
    values = torch.ones(_REDUCED // 4, dtype=torch.float32, device=world.device)
    seconds = []
    for _ in range(6):
        values.fill_(1.0)
        world.barrier()
        world.synchronize()
        began = time.perf_counter()
        world.all_reduce(values)
        world.synchronize()
        seconds.append(time.perf_counter() - began)
    rate = _REDUCED / min(seconds[1:])
    result = f"{world.size} ranks, {_REDUCED // _MIB} MiB in {1000 * min(seconds[1:]):.1f} ms ({rate / 1e9:.2f} GB/s)"
    correct = bool((values == world.size).all())
    return Diagnosis(
        "all-reduce", result, "" if correct else "The sum is wrong: check network cards, drivers and NCCL."
    )


def _device(config: Config) -> Diagnosis:
    try:
        device = choose_device(config, detect_process(os.environ))
    except DistTrainError as error:
        return Diagnosis("device", f"{config.device} is not available", str(error))
    if device == "cuda":
        cards = []
        process = detect_process(os.environ)
        for number in [process.local_rank] if process.world_size > 1 else range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            cards.append(f"{torch.cuda.get_device_name(number)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
        return Diagnosis("device", "; ".join(cards))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return Diagnosis("device", f"{device}, {cpu_model()}, {memory:.0f} GiB of memory")


def _threads() -> Diagnosis:
    process, cores = detect_process(os.environ), available_cores()
    threads = threads_per_process(process.local_world_size, os.environ)
    result = f"{process.local_world_size} processes with {threads} threads each on {cores} cores"
    # srun may bind each task to its own cores.
    sharing = 1 if process.started_by == "srun" else process.local_world_size
    if sharing * threads <= cores:
        return Diagnosis("threads", result)
    return Diagnosis(
        "threads", result, "Too few cores. Start fewer processes, set OMP_NUM_THREADS, or request more cores."
    )


def _versions() -> Diagnosis:
    found = {name: version_of(name) or "" for name in ("torch", "torchvision", "accelerate", "wandb")}
    result = ", ".join(f"{name} {version}" for name, version in found.items()) + f"; {' and '.join(backends())}"
    missing = [name for name, version in found.items() if not version]
    if missing:
        return Diagnosis("versions", result, f"Install {', '.join(missing)}: pip install {' '.join(missing)}.")
    minor = {name: int(found[name].split(".")[1]) for name in ("torch", "torchvision")}
    if minor["torchvision"] != minor["torch"] + 15:  # their releases correspond
        wanted = f"torchvision==0.{minor['torch'] + 15}.*"
        return Diagnosis("versions", result, f"torch and torchvision do not match: pip install '{wanted}'.")
    return Diagnosis("versions", result)


def _port() -> Diagnosis:
    """Check the rendezvous port, if the environment names one."""
    wanted = os.environ.get("MASTER_PORT")
    if wanted is None or detect_process(os.environ).world_size > 1:  # with several processes, we use it ourselves
        return Diagnosis("port", "chosen when a run starts")
    with closing(socket.socket()) as listener:
        try:
            listener.bind(("", int(wanted)))
        except (OSError, ValueError) as error:
            return Diagnosis(
                "port", f"MASTER_PORT={wanted}: {error}", "Unset MASTER_PORT: launchers choose a free one."
            )
    return Diagnosis("port", f"MASTER_PORT={wanted} is free; it is set in this shell, and srun will use it")


def _folder(runs_dir: Path, size: CheckpointSize) -> Iterator[Diagnosis]:
    """Check free space, and what saving relies on: syncing a file, renaming it over another, locking."""
    name, other = "runs_dir", "Choose another folder with runs_dir or DIST_TRAIN_RUNS_DIR."
    probe = runs_dir / f".doctor_{socket.gethostname()}_{os.getpid()}"
    try:
        probe.mkdir(parents=True)
        began = time.perf_counter()
        for text in ("old", "new"):
            write_atomically(probe / "whole", text)
        seconds = (time.perf_counter() - began) / 2
        with FileLock(probe / "lock", timeout=0):
            pass
        stats = os.statvfs(runs_dir)
    except (OSError, NotImplementedError) as error:
        yield Diagnosis(name, f"{runs_dir}: {error}", other)
        return
    finally:
        shutil.rmtree(probe, ignore_errors=True)
    slow = seconds > _SLOW_S
    yield Diagnosis(
        name,
        f"{runs_dir}: a file is written, synced and renamed in {1000 * seconds:.0f} ms, locks work",
        f"A checkpoint makes about ten such writes. {other}" if slow else "",
    )
    free = stats.f_bavail * stats.f_frsize
    full = stats.f_files > 0 and stats.f_favail < 1000  # some file systems do not count inodes
    result = f"{free / 2**30:.1f} GiB" + (f" and {stats.f_favail:,} inodes" if stats.f_files else "") + " free"
    fix = f"Checkpoints need {size.times(AT_ONCE)} and some files: free some space. {other}"
    yield Diagnosis("room", result, fix if full or free < AT_ONCE * size.total else "")


def _wandb(config: Config) -> Diagnosis:
    mode = wandb_mode(config.tracking, os.environ)
    if mode != "online":
        return Diagnosis(
            "W&B", {"offline": "recorded offline; upload with `dist-train wandb sync`", "disabled": "disabled"}[mode]
        )
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai")
    with suppress(OSError), closing(socket.create_connection((host.hostname, host.port or 443), timeout=3)):
        return Diagnosis("W&B", f"{host.hostname} answers")
    return Diagnosis(
        "W&B", f"{host.hostname} does not answer: runs are recorded offline, `dist-train wandb sync` uploads them later"
    )


def _slurm() -> Diagnosis:
    try:
        return Diagnosis("Slurm", installed_version())
    except LaunchError:
        return Diagnosis("Slurm", "not available on this machine")
