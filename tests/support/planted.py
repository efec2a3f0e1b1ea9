"""A rank of `dist-train verify` with the fault that FAULT names."""

from __future__ import annotations

import os
from typing import Any

from dist_train.data import evaluation_batches
from dist_train.data.sampler import ShardSampler, evaluation_shard
from dist_train.models.tasks.objective import Objective
from dist_train.tools.verify import rank
from dist_train.training.step.eager import EagerUpdate
from dist_train.training.step.train_step import Step

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

if __name__ == "__main__":
    setattr(*FAULTS[os.environ["FAULT"]])
    rank.main()
