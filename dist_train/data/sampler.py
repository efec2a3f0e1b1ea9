"""Training and evaluation shards: pure functions of seed, step, rank and world size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from copy import copy
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from dist_train.config.batch_plan import BatchPlan
from dist_train.distributed.rng import derive_seed


class ShardSampler(DistributedSampler[Any]):
    """This rank's example indices of each step.

    As torch's DistributedSampler, it interleaves the epoch's order over the ranks, so that one global batch holds
    the same examples for any world size. It differs in three ways: the order is seeded by a hash of (seed, epoch)
    (with torch's `seed + epoch`, seed 0 epoch 1 equals seed 1 epoch 0), any step can be requested, and the indices are
    tensors. The tail of an epoch that does not fill a global batch is dropped: `num_dropped` examples, different ones
    in each epoch.

    With `weights` (>= 0, not all 0, float64 [num_examples]), the order of an epoch is `num_examples` draws with
    replacement in proportion to them.
    """

    def __init__(self, num_examples: int, plan: BatchPlan, rank: int, seed: int, weights: Tensor | None = None) -> None:
        super().__init__(
            cast(Any, _Length(num_examples)), num_replicas=plan.world_size, rank=rank, shuffle=True, drop_last=True
        )
        self.num_examples = num_examples
        self.plan = plan
        self.run_seed = seed
        self.steps_per_epoch = plan.check_epoch(num_examples)
        self.num_dropped = num_examples % plan.global_batch_size
        self.num_samples = self.steps_per_epoch * plan.per_rank_batch_size
        self.total_size = self.steps_per_epoch * plan.global_batch_size
        # The upper end of each example's interval. Not torch.multinomial: it takes at most 2**24 examples.
        self._upper_ends = None if weights is None else (weights / weights.max()).cumsum(0)
        self._order: tuple[int, Tensor] | None = None
        self._device = torch.device("cpu")

    def on(self, device: torch.device) -> ShardSampler:
        """Return a copy whose indices are on `device`: moved once per epoch, not once per step."""
        moved = copy(self)
        moved._device, moved._order = device, None
        return moved

    @property
    def replaces(self) -> bool:
        """Whether an epoch may hold an example more than once."""
        return self._upper_ends is not None

    def order(self, epoch: int) -> Tensor:
        """Return the examples of `epoch` (from 0) in their order: int64 [num_examples]."""
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.run_seed, "epoch", epoch))
            self._order = epoch, self._draw(generator).to(self._device)
        return self._order[1]

    def _draw(self, generator: torch.Generator) -> Tensor:
        if self._upper_ends is None:
            return torch.randperm(self.num_examples, generator=generator)
        points = torch.rand(self.num_examples, dtype=torch.float64, generator=generator) * self._upper_ends[-1]
        return torch.searchsorted(self._upper_ends, points, right=True)  # right: never an example of weight 0

    def times_held(self, epoch: int) -> Tensor:
        """Return how often the steps of `epoch` hold each example, over all ranks: int64 [num_examples]."""
        return torch.bincount(self.order(epoch)[: self.total_size], minlength=self.num_examples)

    def indices(self, step: int) -> Tensor:
        """Return this rank's examples of the update after `step` (from 0) updates: int64 [per_rank_batch_size]."""
        return self.batch(step)[self.rank :: self.plan.world_size]

    def batch(self, step: int) -> Tensor:
        """Return the examples of that update over all ranks, its global batch: int64 [global_batch_size]."""
        epoch, in_epoch = divmod(step, self.steps_per_epoch)
        start = in_epoch * self.plan.global_batch_size
        return self.order(epoch)[start : start + self.plan.global_batch_size]

    def at(self, step: int, positions: slice | Tensor) -> Tensor:
        """Return the examples at these positions of the global batch."""
        if isinstance(positions, Tensor):
            positions = positions.to(self._device, non_blocking=True)
        return self.batch(step)[positions]

    def positions(self, micro_step: int) -> slice:
        """Return which examples of a global batch are this rank's micro-batch."""
        start = micro_step * self.plan.per_device_batch_size * self.plan.world_size
        end = start + self.plan.per_device_batch_size * self.plan.world_size
        return slice(start + self.rank, end, self.plan.world_size)

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of the epoch set by `set_epoch`, as a DataLoader expects."""
        first = self.epoch * self.steps_per_epoch
        for step in range(first, first + self.steps_per_epoch):
            yield from self.indices(step).tolist()


class _Length(Sized):
    """The part of a data set that DistributedSampler needs."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length


def count_into(counts: Tensor, batches: Sequence[Tensor]) -> None:
    """Increment `counts` [num_examples] for each index of these batches, which may be on any device."""
    if batches:
        indices = torch.cat([each.to(counts.device) for each in batches])
        counts.index_add_(0, indices, torch.ones_like(indices, dtype=counts.dtype))


def evaluation_shard(num_examples: int, rank: int, world_size: int) -> Tensor:
    """Return the examples this rank evaluates, each on exactly one rank: int64 [about num_examples / world_size].

    Unlike DistributedSampler, it does not pad: padding counts examples twice and distorts a user's own metric.
    """
    return torch.arange(min(rank, num_examples), num_examples, world_size)
