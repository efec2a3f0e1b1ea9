"""Forked ranks for `dist-train verify`, with a fault planted in them if the test wants one."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dist_train.data import evaluation_batches
from dist_train.data.sampler import ShardSampler, evaluation_shard
from dist_train.errors import LaunchError
from dist_train.models.tasks.objective import Objective
from dist_train.tools.verify import suite
from dist_train.tools.verify.rank import run
from dist_train.tools.verify.trial import Trial
from dist_train.training.step.eager import EagerUpdate
from dist_train.training.step.train_step import Step
from support.ranks import join_group, run_on_ranks, use_only_gloo

_positions, _loss = ShardSampler.positions, Objective.loss


def doubled_shard(sampler: ShardSampler, micro_step: int) -> Any:
    """Return the positions of rank zero's examples on every rank."""
    mine, sampler.rank = sampler.rank, 0
    try:
        return _positions(sampler, micro_step)
    finally:
        sampler.rank = mine


def first_shard_on_every_rank(total: int, rank: int, world_size: int) -> Any:
    return evaluation_shard(total, 0, world_size)


FAULTS: dict[str, tuple[Any, str, Any]] = {
    "a doubled shard": (ShardSampler, "positions", doubled_shard),
    "a doubled evaluation": (evaluation_batches, "evaluation_shard", first_shard_on_every_rank),
    "a mean per rank": (EagerUpdate, "sync_gradients", lambda self, when: self.world.accelerator.no_sync(self.model)),
    "a sum for a mean": (Objective, "loss", lambda self, output, targets: _loss(self, output, targets) * len(targets)),
    "a missing warm-up": (Step, "warm_up", lambda self, step, wanted="eager": None),
}


def verify_on_forked_ranks(monkeypatch: pytest.MonkeyPatch, fault: str | None = None) -> None:
    """Let `verify` run its trials on forked ranks, which start in a tenth of the time, with this fault in each."""
    monkeypatch.setattr(suite, "output_of_ranks", partial(_output_of_ranks, fault))
    monkeypatch.setattr(suite, "output_of", partial(_output_of_ranks, fault, 1))


def _output_of_ranks(fault: str | None, size: int, _program: str, settings: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        printed = Path(folder, "out")
        try:
            run_on_ranks(_run, fault, settings, printed, world_size=size)
        except AssertionError as error:
            raise LaunchError(str(error)) from error
        return printed.read_text()


def _run(fault: str | None, settings: str, printed: Path) -> None:
    if fault is not None:
        setattr(*FAULTS[fault])
        use_only_gloo()  # the order in which it adds depends on DDP's buckets, and so on the warm-up
    if os.environ["RANK"] == "0":
        os.dup2(os.open(printed, os.O_WRONLY | os.O_CREAT), 1)
    join_group("ranks")
    run(Trial(**json.loads(settings)))
    sys.stdout.flush()
