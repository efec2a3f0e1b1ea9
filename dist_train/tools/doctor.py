"""Is everything there that a run needs? One finding for each thing looked at, with the fix where it is wrong."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch
from filelock import FileLock

from dist_train.atomic_files import write_atomically
from dist_train.config.paths import runs_root
from dist_train.config.schema import Config
from dist_train.data.sets.image_set import num_examples
from dist_train.data.splits import load_splits
from dist_train.distributed.devices import choose_device
from dist_train.distributed.process import available_cores, detect_process, threads_per_process
from dist_train.distributed.world import World, backends
from dist_train.errors import DistTrainError, LaunchError
from dist_train.launch.slurm.commands import installed_version
from dist_train.launch.subprocesses import output_of_ranks
from dist_train.models.registry import build_model
from dist_train.training.provenance import cpu_model, version_of
from dist_train.training.tracking import wandb_mode

_MIB = 2**20
_EXCHANGED = 16 * _MIB  # bytes of the all-reduce that is timed
_SLOW_S = 1.0  # of a file that is written and synced


Row = dict[str, str]  # what, said, fix: as `dist-train doctor --json` prints them

RANKS_OF_OURS = "DIST_TRAIN_DOCTOR"  # set for ranks that `doctor --nproc` starts: it reports what they found
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
    """What one process can see by itself."""
    yield _device(config)
    yield _threads()
    yield _versions()
    checkpoint_bytes = 0
    try:
        splits = load_splits(config.data, config.seed, detect_process(os.environ).local_world_size)
        yield Diagnosis("data", f"{config.data.bundle or config.data.name}: {num_examples(splits.train):,} to train on")
        net = build_model(config.model, splits.input_spec, config.seed)
        # Weights and twice as much of optimizer state.
        checkpoint_bytes = 3 * sum(parameter.nbytes for parameter in net.parameters())
        parameters = f"{sum(p.numel() for p in net.parameters()):,} parameters"
        name = config.model.bundle or config.model.name
        yield Diagnosis("net", f"{name}: {parameters}, a checkpoint takes {checkpoint_bytes / _MIB:.1f} MiB")
    except DistTrainError as error:
        yield Diagnosis("data and net", "not as asked for", str(error))
    yield _port()
    yield from _folder(runs_dir, needed_bytes=2 * checkpoint_bytes)
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


def start_and_examine(nproc: int, config_name: str, overrides: Sequence[str]) -> list[Row]:
    """The same on `nproc` ranks that are started for it.

    Raises:
        LaunchError: They cannot be started.
    """
    arguments = ["-c", config_name, *(f"-o{override}" for override in overrides), "--json"]
    environment = {"OMP_NUM_THREADS": str(threads_per_process(nproc, os.environ)), RANKS_OF_OURS: "1"}
    printed = output_of_ranks(nproc, "dist_train", "doctor", *arguments, environment=environment)
    rows: list[Row] = json.loads(printed.splitlines()[-1])
    return rows


def exchange(world: World) -> Diagnosis:
    """An all-reduce between all ranks, timed.

    Collective: every rank must call this.
    """
    if world.size == 1:
        return Diagnosis("all-reduce", "one process: nothing to exchange (try --nproc)")
    values = torch.ones(_EXCHANGED // 4, dtype=torch.float32, device=world.device)
    seconds = []
    for _ in range(6):
        values.fill_(1.0)
        world.barrier()
        world.synchronize()
        began = time.perf_counter()
        world.all_reduce(values)
        world.synchronize()
        seconds.append(time.perf_counter() - began)
    rate = _EXCHANGED / min(seconds[1:])
    result = f"{world.size} ranks, {_EXCHANGED // _MIB} MiB in {1000 * min(seconds[1:]):.1f} ms ({rate / 1e9:.2f} GB/s)"
    right = bool((values == world.size).all())
    return Diagnosis(
        "all-reduce", result, "" if right else "The sum is wrong: look at network cards, drivers and NCCL."
    )


def _device(config: Config) -> Diagnosis:
    try:
        device = choose_device(config, detect_process(os.environ))
    except DistTrainError as error:
        return Diagnosis("device", f"{config.device} is not to be had", str(error))
    if device == "cuda":
        cards = []
        place = detect_process(os.environ)
        for number in [place.local_rank] if place.world_size > 1 else range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            cards.append(f"{torch.cuda.get_device_name(number)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
        return Diagnosis("device", "; ".join(cards))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return Diagnosis("device", f"{device}, {cpu_model()}, {memory:.0f} GiB of memory")


def _threads() -> Diagnosis:
    place, cores = detect_process(os.environ), available_cores()
    threads = threads_per_process(place.local_world_size, os.environ)
    result = f"{place.local_world_size} processes of {threads} threads on {cores} cores"
    mine = 1 if place.started_by == "srun" else place.local_world_size  # srun may bind each task to cores of its own
    if mine * threads <= cores:
        return Diagnosis("threads", result)
    return Diagnosis(
        "threads", result, "They will wait for each other. Start fewer, set OMP_NUM_THREADS, or ask for more cores."
    )


def _versions() -> Diagnosis:
    found = {name: version_of(name) or "" for name in ("torch", "torchvision", "accelerate", "wandb")}
    result = ", ".join(f"{name} {version}" for name, version in found.items()) + f"; {' and '.join(backends())}"
    missing = [name for name, version in found.items() if not version]
    if missing:
        return Diagnosis("versions", result, f"Install {', '.join(missing)}: pip install {' '.join(missing)}.")
    minor = {name: int(found[name].split(".")[1]) for name in ("torch", "torchvision")}
    if minor["torchvision"] != minor["torch"] + 15:  # as the two are released
        wanted = f"torchvision==0.{minor['torch'] + 15}.*"
        return Diagnosis("versions", result, f"They do not belong together: pip install '{wanted}'.")
    return Diagnosis("versions", result)


def _port() -> Diagnosis:
    """The port that ranks would meet at, if the environment names one."""
    wanted = os.environ.get("MASTER_PORT")
    if wanted is None or detect_process(os.environ).world_size > 1:  # in a world it is in use: by us
        return Diagnosis("port", "chosen when a run starts")
    with closing(socket.socket()) as here:
        try:
            here.bind(("", int(wanted)))
        except (OSError, ValueError) as error:
            return Diagnosis(
                "port", f"MASTER_PORT={wanted}: {error}", "Unset MASTER_PORT: launchers choose a free one."
            )
    return Diagnosis("port", f"MASTER_PORT={wanted} is free; it is set in this shell, and srun will use it")


def _folder(runs_dir: Path, needed_bytes: int) -> Iterator[Diagnosis]:
    """Room, and what saving relies on: a file that is synced, a rename over another, a lock."""
    name, other = "runs_dir", "Choose another place with runs_dir or DIST_TRAIN_RUNS_DIR."
    probe = runs_dir / f".doctor_{socket.gethostname()}_{os.getpid()}"
    try:
        probe.mkdir(parents=True)
        began = time.perf_counter()
        for text in ("old", "new"):
            write_atomically(probe / "whole", text)
        seconds = (time.perf_counter() - began) / 2
        with FileLock(probe / "lock", timeout=0):
            pass
        found = os.statvfs(runs_dir)
    except (OSError, NotImplementedError) as error:
        yield Diagnosis(name, f"{runs_dir}: {error}", other)
        return
    finally:
        shutil.rmtree(probe, ignore_errors=True)
    slow = seconds > _SLOW_S
    yield Diagnosis(
        name,
        f"{runs_dir}: a file is written, synced and renamed in {1000 * seconds:.0f} ms, locks work",
        f"A checkpoint makes some ten such calls. {other}" if slow else "",
    )
    free = found.f_bavail * found.f_frsize
    full = found.f_files > 0 and found.f_favail < 1000  # some file systems count none
    result = f"{free / 2**30:.1f} GiB" + (f" and {found.f_favail:,} inodes" if found.f_files else "") + " free"
    fix = f"Two checkpoints side by side take {needed_bytes / _MIB:.1f} MiB and some files: make room. {other}"
    yield Diagnosis("room", result, fix if full or free < needed_bytes else "")


def _wandb(config: Config) -> Diagnosis:
    mode = wandb_mode(config.tracking, os.environ)
    if mode != "online":
        return Diagnosis(
            "W&B", {"offline": "recorded offline, to be sent by `dist-train wandb sync`", "disabled": "disabled"}[mode]
        )
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai")
    with suppress(OSError), closing(socket.create_connection((host.hostname, host.port or 443), timeout=3)):
        return Diagnosis("W&B", f"{host.hostname} answers")
    return Diagnosis(
        "W&B", f"{host.hostname} does not answer: runs are recorded offline, `dist-train wandb sync` sends them later"
    )


def _slurm() -> Diagnosis:
    try:
        return Diagnosis("Slurm", installed_version())
    except LaunchError:
        return Diagnosis("Slurm", "not on this machine")
