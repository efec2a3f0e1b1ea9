"""The exchange of gradients through shared memory: the mean, on every rank the same bits, and an end to every wait."""

from __future__ import annotations

import mmap
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_train.atomic_files import write_json
from dist_train.config.loading import parse_config
from dist_train.distributed import shared_memory
from dist_train.distributed.peer_failures import is_peer_failure, is_timeout
from dist_train.distributed.shared_memory import SLOT_BYTES, SharedMemory, share_memory
from dist_train.distributed.world import World
from dist_train.runs.directory import RunDir
from support.patience import PATIENCE_S
from support.ranks import join_group, run_on_ranks, train_here, train_on_ranks, use_only_gloo
from support.run_files import assert_bit_identical
from support.trainings import MNIST

LENGTHS = (0, 1, 7, 1000, SLOT_BYTES // 4, SLOT_BYTES // 4 + 1, 3 * SLOT_BYTES // 4 + 5)
SETTINGS: dict[str, Any] = {
    **MNIST, "model": {"name": "guide"}, "train_for": "6 steps", "log_every": 1, "save_every": "3 steps",
}  # fmt: skip
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)


def _world(timeout_s: float = 60.0) -> tuple[World, SharedMemory]:
    join_group("ranks")
    world = World.join(parse_config({"device": "cpu"})).with_shared_memory(timeout_s)
    assert world.exchange == "shared memory"
    assert world.shared_memory is not None
    return world, world.shared_memory


def _values(rank: int, length: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(1000 * rank + length), dtype=torch.float64).to(
        dtype
    )


def _averages() -> None:
    world, shared = _world()
    for dtype in DTYPES:
        for length in LENGTHS if dtype == torch.float32 else LENGTHS[:4]:
            own = _values(world.rank, length, dtype)
            shared.average(own)
            expected = sum(_values(rank, length, dtype) / world.size for rank in range(world.size))
            assert own.equal(expected), (dtype, length)  # type: ignore[arg-type]
            theirs = [_values(rank, length, torch.float64) for rank in range(world.size)]
            mean = torch.stack(theirs).mean(0) if length else torch.zeros(0)
            torch.testing.assert_close(own.real.double(), mean.double(), rtol=0.02, atol=0.02)
            if world.size == 2:
                by_gloo = _values(world.rank, length, dtype) / 2
                world.all_reduce(by_gloo)
                assert own.equal(by_gloo)
    world.leave()


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_every_rank_gets_the_sum_in_the_order_of_the_ranks(world_size: int) -> None:
    run_on_ranks(_averages, world_size=world_size)


def _many_rounds() -> None:
    """Ranks that are late in turns, so that a slot would be overwritten before it is read if nothing prevented it."""
    world, shared = _world()
    for number in range(400):
        if number % world.size == world.rank and number % 7 == 0:
            time.sleep(0.002)  # longer than the others ask before they sleep
        values = torch.full((5000,), float(number + world.rank))
        shared.average(values)
        expected = sum(torch.tensor((number + rank) / world.size) for rank in range(world.size))
        assert values.eq(expected).all(), number
    world.leave()


@pytest.mark.parametrize("world_size", [2, 4])
def test_no_slot_is_written_before_all_have_read_it(world_size: int) -> None:
    run_on_ranks(_many_rounds, world_size=world_size)


def _with_a_dead_peer(folder: Path) -> None:
    world, shared = _world()
    shared.average(torch.ones(10))
    world.barrier()
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RuntimeError, match="rank 1 has ended") as raised:
        shared.average(torch.ones(10))
    assert is_peer_failure(raised.value)
    assert not is_timeout(raised.value)
    (folder / f"told_{world.rank}").touch()
    os._exit(0)


def _backward_with_a_dead_peer(folder: Path) -> None:
    world, _shared = _world()
    model = world.accelerator.prepare(nn.Linear(1000, 1000), device_placement=[False])
    world.exchange_gradients(model)
    for _ in range(3):  # in the second, DDP rebuilds its buckets over gloo
        model(torch.ones(2, 1000)).sum().backward()
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RuntimeError, match="rank 1 has ended") as raised:
        model(torch.ones(2, 1000)).sum().backward()
    assert is_peer_failure(raised.value)
    (folder / "told").touch()
    os._exit(0)


def test_the_error_arrives_as_it_is_through_a_backward_pass(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="exit codes"):  # of the killed rank
        run_on_ranks(_backward_with_a_dead_peer, tmp_path, world_size=2)
    assert (tmp_path / "told").exists()


def test_a_killed_rank_ends_the_wait_of_the_others(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="exit codes"):  # of the killed rank
        run_on_ranks(_with_a_dead_peer, tmp_path, world_size=3)
    assert {path.name for path in tmp_path.iterdir()} == {"told_0", "told_2"}


def _with_a_late_peer(folder: Path) -> None:
    world, shared = _world()
    world.set_timeout(0.5)
    if world.rank == 0:
        with pytest.raises(RuntimeError, match=r"Timed out waiting 0.5 s for rank 1") as raised:
            shared.average(torch.ones(10))
        assert is_peer_failure(raised.value)
        assert is_timeout(raised.value)
        (folder / "told").touch()
    while not (folder / "told").exists():
        time.sleep(0.01)
    os._exit(0)


def test_the_wait_for_a_rank_has_a_limit(tmp_path: Path) -> None:
    run_on_ranks(_with_a_late_peer, tmp_path, world_size=2)


def _refused(rank: int, call: str, folder: Path) -> None:
    """One rank's system refuses a call. The others are told, and do not wait until a time-out."""
    shared_memory.CONNECT_S = 2 * PATIENCE_S
    join_group("ranks")
    world = World.join(parse_config({"device": "cpu"}))

    def refuse(*_args: object) -> None:
        raise OSError(f"{call} refused")

    if world.rank == rank:
        place = next(each for each in (os, mmap, shared_memory) if hasattr(each, call))
        setattr(place, call, refuse)
    (folder / f"why_{world.rank}").write_text(str(share_memory(world.rank, world.size, world.gather, 60.0)))
    assert world.with_shared_memory(60.0).exchange == "gloo"
    world.leave()


@pytest.mark.parametrize(
    ("rank", "call"), [(0, "memfd_create"), (0, "mmap"), (1, "mmap"), (1, "getuid"), (2, "host_identity")]
)
def test_all_ranks_fall_back_together(rank: int, call: str, tmp_path: Path) -> None:
    run_on_ranks(_refused, rank, call, tmp_path, world_size=3)
    assert {path.read_text() for path in tmp_path.iterdir()} == {f"rank {rank}: {call} refused"}


@pytest.mark.parametrize(("before", "after"), [("shared memory", "shared memory"), ("gloo", "gloo"), (None, "gloo")])
def test_a_resume_keeps_the_exchange(before: str | None, after: str, tmp_path: Path) -> None:
    """A run of an older version recorded none, and goes on as it began."""
    run_dir = RunDir(tmp_path / "run")
    train_on_ranks(SETTINGS, run_dir.path, world_size=3, stop_after=3)
    recorded = run_dir.read_provenance()
    assert recorded.pop("exchange") == "shared memory"
    write_json(run_dir.run_json, recorded | ({"exchange": before} if before else {}))
    train_on_ranks(SETTINGS, run_dir.path, world_size=3)
    assert run_dir.read_provenance()["exchange"] == after
    log = run_dir.rank_log(0).read_text()
    said = re.findall(r"gradients of the 3 processes are added by (.+)", log)
    assert said == ["shared memory", after]


def _losses(exchange: str, run_dir: Path) -> None:
    if exchange == "gloo":
        use_only_gloo()
    train_here(SETTINGS, run_dir)


def test_two_ranks_train_to_the_bit_as_over_gloo(tmp_path: Path) -> None:
    for exchange in ("gloo", "shared memory"):
        run_on_ranks(_losses, exchange, tmp_path / exchange, world_size=2)
        assert RunDir(tmp_path / exchange).read_provenance()["exchange"] == exchange
    assert_bit_identical(tmp_path / "gloo", tmp_path / "shared memory")
