"""How long ranks wait for each other: setup_timeout_s until the first step, stall_timeout_s afterwards."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_train.config.loading import parse_config
from dist_train.distributed.peer_failures import is_peer_failure, is_timeout
from dist_train.distributed.world import World
from dist_train.errors import LaunchError
from dist_train.launch.machines import Nodes
from dist_train.runs.directory import RunDir
from support.patience import PATIENCE_S, wait_until
from support.processes import DIST_TRAIN
from support.ranks import join_group, run_forked, run_on_ranks
from support.trainings import SETTINGS

LATE_S = 3.0


def join(port: int, rank_one_after_s: float, setup_timeout_s: float) -> World:
    """Join through the store of a launcher, as ranks of torchrun do."""
    os.environ |= {
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "MASTER_PORT": str(port),
    }  # fmt: skip
    if os.environ["RANK"] == "1":
        time.sleep(rank_one_after_s)
    return World.join(parse_config({"device": "cpu", "stall_timeout_s": 0.5, "setup_timeout_s": setup_timeout_s}))


def launcher_store() -> Any:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]


def join_late(port: int) -> None:
    world = join(port, LATE_S, PATIENCE_S)
    if world.rank == 0:
        time.sleep(LATE_S)
    assert world.all_reduce(torch.ones(())) == 2
    world.leave()


def test_late_rank_is_waited_for() -> None:
    """It is later than stall_timeout_s: first to join the group, then in its set-up."""
    store = launcher_store()
    run_on_ranks(join_late, store.port, world_size=2)


def wait_for_missing_rank(port: int, over: Path) -> None:
    if os.environ["RANK"] == "1":
        wait_until(over.exists, "end of the wait")
        return
    try:
        with pytest.raises(LaunchError, match=r"Rank 0 of 2 could not connect .* raise setup_timeout_s=2\."):
            join(port, 0.0, setup_timeout_s=2.0)
    finally:
        over.touch()


def test_missing_rank_times_out(tmp_path: Path) -> None:
    store = launcher_store()
    run_on_ranks(wait_for_missing_rank, store.port, tmp_path / "over", world_size=2)


def stall_after_set_up(over: Path) -> None:
    join_group("stalling")
    world = World.join(parse_config({"device": "cpu"}))
    world.barrier()
    if world.rank == 1:
        wait_until(over.exists, "end of the wait")
        os._exit(0)
    world.set_timeout(1.0)
    try:
        with pytest.raises(RuntimeError) as caught:
            world.all_reduce(torch.ones(()))
    finally:
        over.touch()
    assert is_peer_failure(caught.value)
    assert is_timeout(caught.value)
    os._exit(0)


def test_timeout_is_shorter_after_setup(tmp_path: Path) -> None:
    run_on_ranks(stall_after_set_up, tmp_path / "over", world_size=2)


def test_stalled_rank_ends_training(tmp_path: Path) -> None:
    """The other rank reports the timeout; the watchdog of the hanging rank ends it 5 s later."""
    net = ["model.name=support.user_nets:Hanging", "model.args.call=5", "model.args.rank=1"]
    command = [*DIST_TRAIN, "train", *SETTINGS, *net, "stall_timeout_s=4", "--run-name=r"]
    done = run_forked(command, tmp_path, world_size=2)
    assert done.returncode == 1
    assert "Another rank did not answer within stall_timeout_s=4" in done.stderr


def test_launcher_timeout_equals_setup_timeout(tmp_path: Path) -> None:
    options = Nodes.parse("2", "localhost", 1234.5).options(RunDir(tmp_path / "r"))
    assert any(option.startswith("--rdzv-conf=") and "join_timeout=1235," in option for option in options)
