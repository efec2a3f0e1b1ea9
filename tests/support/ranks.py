"""Real gloo ranks for tests, and whole trainings on them."""

from __future__ import annotations

import faulthandler
import multiprocessing as mp
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from support.patience import PATIENCE_S
from support.processes import DIST_TRAIN

# Forked from a server that has imported torch once: a rank starts in 0.1 s instead of 4 s.
_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["dist_train.training.run", "dist_train.cli", "support.ranks", "torch._dynamo"])


ONLY_GLOO = "TEST_ONLY_GLOO"  # a variable of run_forked: if set, ranks do not share memory


def run_on_ranks(function: Callable[..., None], *args: Any, world_size: int, timeout_s: float = PATIENCE_S) -> None:
    """Run `function(*args)` on `world_size` CPU processes with the environment that torchrun sets.

    Raises:
        AssertionError: with the traceback of the rank that failed first: the others only report the loss of their peer.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = [(function, args, rank, world_size, folder, dict(os.environ)) for rank in range(world_size)]
        late, codes = _run_processes(_run_rank, arguments, timeout_s)
        errors = sorted(Path(folder).glob("error_*"))  # named by time
        if errors:
            raise AssertionError(errors[0].read_text())
        if late or any(codes):
            raise AssertionError(f"{late} late, exit codes {codes}\n{_stacks(folder)}")


def _run_processes(
    target: Callable[..., None], arguments: list[tuple[Any, ...]], timeout_s: float
) -> tuple[int, list[int]]:
    """Run a process per argument tuple; return how many had to be killed, and all exit codes."""
    ranks = [_CONTEXT.Process(target=target, args=each) for each in arguments]
    late = []
    try:
        for rank in ranks:
            rank.start()
        deadline = time.monotonic() + timeout_s
        for rank in ranks:
            rank.join(max(0.0, deadline - time.monotonic()))
    finally:
        late = [rank for rank in ranks if rank.is_alive()]
        for rank in late:
            os.kill(rank.pid or 0, signal.SIGUSR2)  # prints its stack
            rank.join(1)
            rank.kill()
            rank.join()
    return len(late), [rank.exitcode or 0 for rank in ranks]


def _stacks(folder: str) -> str:
    return "\n".join(path.read_text() for path in sorted(Path(folder).glob("stack_*")))


def _run_rank(
    function: Callable[..., None], args: Sequence[Any], rank: int, world_size: int, folder: str, env: dict[str, str]
) -> None:
    os.environ.clear()
    os.environ.update(env)
    _set_rank_environment(rank, world_size, folder)
    _dump_stack_on_signal(rank, folder)
    try:
        function(*args)
    except BaseException:
        Path(folder, f"error_{time.time_ns()}_{rank}").write_text(traceback.format_exc())
        sys.stdout.flush()
        os._exit(1)


def _dump_stack_on_signal(rank: int, folder: str) -> None:
    faulthandler.register(signal.SIGUSR2, Path(folder, f"stack_{rank}").open("w"))  # noqa: SIM115 - stays open


def _set_rank_environment(rank: int, world_size: int, folder: str) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in place.items()})
    # Rendezvous through a file, so that no port can clash; the address is set only because a launcher sets it.
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"})
    os.environ["TEST_RENDEZVOUS"] = folder
    # Loader workers fork, as in a rank of torchrun; otherwise each rank would start a fork server that imports torch.
    mp.set_start_method("fork", force=True)


def run_forked(
    command: Sequence[str], folder: Path, world_size: int = 1, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a `dist-train` command like `processes.run`, but on forked ranks, for tests that do not test process starts.

    The output is rank zero's; the exit code is the first nonzero one.
    """
    assert command[: len(DIST_TRAIN)] == DIST_TRAIN
    given = [*command[len(DIST_TRAIN) :]], folder
    with tempfile.TemporaryDirectory() as made:
        arguments = [(*given, rank, world_size, made, dict(os.environ) | env) for rank in range(world_size)]
        late, codes = _run_processes(_run_command, arguments, PATIENCE_S)
        assert not late, _stacks(made)
        out, err = (Path(made, f"{name}_0").read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess(command, next(filter(None, codes), 0), out, err)


def _run_command(
    arguments: list[str], folder: Path, rank: int, world_size: int, made: str, env: dict[str, str]
) -> None:
    from dist_train.cli import main

    for descriptor, name in ((1, "out"), (2, "err")):
        with Path(made, f"{name}_{rank}").open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(env)
    _dump_stack_on_signal(rank, made)
    if env.get(ONLY_GLOO):
        use_only_gloo()
    os.chdir(folder)
    if world_size > 1:
        _set_rank_environment(rank, world_size, made)
        join_group("ranks")
    main(arguments, prog_name="dist-train")


def use_only_gloo() -> None:
    """Let the ranks of this host exchange gradients like those of several hosts."""
    from dist_train.distributed import shared_memory

    shared_memory.share_memory = lambda *_: "the test wants gloo"


def join_group(name: str) -> None:
    """Join a process group through a file. Groups may follow each other, each with its own name."""
    import torch.distributed as dist
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    # Also for a world of one: Accelerate would start a server on MASTER_PORT.
    path = Path(os.environ["TEST_RENDEZVOUS"], name)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world_size)


def train_here(settings: dict[str, Any], run_dir: Path, stop_after: int | None = None, *, extend: bool = False) -> str:
    """Train one attempt on this rank. `stop_after`: rank 1, if any, gets a stop request after that many steps."""
    import torch

    from dist_train.config.loading import parse_config
    from dist_train.distributed.job_scheduler import JobScheduler
    from dist_train.distributed.signals import StopRequest
    from dist_train.runs.start_options import StartOptions
    from dist_train.training import agreement
    from dist_train.training.run import run_training
    from dist_train.training.step import train_step as step

    join_group(f"{run_dir.name}_{_count()}")
    config = parse_config({"tracking": {"wandb": "disabled", "pictures": False}, **settings})
    request = StopRequest()
    stopped_rank = min(1, int(os.environ["WORLD_SIZE"]) - 1)  # only one rank gets the request
    take, original = step.Step.take, agreement.Agreement.__init__

    def take_and_request(self: step.Step, number: int) -> None:
        take(self, number)
        if number + 1 == stop_after and int(os.environ["RANK"]) == stopped_rank:
            request.request("INTERRUPT")

    def agree_at_each_step(self: agreement.Agreement, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "interval_s": 0.0})

    if stop_after is not None:
        step.Step.take = take_and_request  # type: ignore[method-assign, assignment]
        agreement.Agreement.__init__ = agree_at_each_step  # type: ignore[method-assign]
    try:
        start = StartOptions(config_name="test", run_dir=run_dir, verbosity=-1, extend=extend)
        return run_training(config, start, request, time.perf_counter(), JobScheduler())
    finally:
        step.Step.take = take  # type: ignore[method-assign]
        agreement.Agreement.__init__ = original  # type: ignore[method-assign]
        torch.set_default_dtype(torch.float32)


_groups = 0


def _count() -> int:
    """Return a number that is equal on every rank and new at each call."""
    global _groups
    _groups += 1
    return _groups


def train_on_ranks(
    settings: dict[str, Any],
    run_dir: Path,
    world_size: int = 1,
    stop_after: int | None = None,
    timeout_s: float = PATIENCE_S,
    extend: bool = False,
) -> None:
    """Run a training, or one attempt of it, on new ranks."""
    run_on_ranks(_train, settings, run_dir, stop_after, extend, world_size=world_size, timeout_s=timeout_s)


def _train(settings: dict[str, Any], run_dir: Path, stop_after: int | None, extend: bool) -> None:
    state = train_here(settings, run_dir, stop_after, extend=extend)
    assert state == ("FINISHED" if stop_after is None else "INTERRUPT")
