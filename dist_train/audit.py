"""Which examples an epoch really trained on, over all ranks: each at most once, or the run stops."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_train.batching import ShardSampler, count_into
from dist_train.distributed import World
from dist_train.errors import DistTrainError

_CHUNK = 256  # batches that are counted together


class ShardAudit:
    """Counts the examples of the epoch under way, from the indices that the updates gathered."""

    def __init__(self, sampler: ShardSampler, world: World, step: int) -> None:
        """The steps of this epoch before `step` were another attempt's: for theirs the sampler has to be believed."""
        self._world = world
        self._counts = torch.zeros(sampler.num_examples, dtype=torch.int32, device=world.device)
        first = step - step % sampler.steps_per_epoch
        self._gathered = [sampler.indices(before).to(world.device) for before in range(first, step)]

    def note(self, indices: Tensor) -> None:
        """int64 [B], of one more batch. Does not wait for the device."""
        self._gathered.append(indices)
        if len(self._gathered) >= _CHUNK:
            self._count()

    def close_epoch(self, epoch: int) -> dict[str, int]:
        """How many examples were trained on and how many dropped; the next epoch begins.

        Collective: every rank must call this.

        Raises:
            DistTrainError: on every rank, if an example was trained on twice.
        """
        self._count()
        counts = self._world.all_reduce(self._counts)
        unique, duplicate = int((counts == 1).sum()), int((counts > 1).sum())
        if duplicate:
            raise DistTrainError(
                f"Epoch {epoch}: {duplicate} of {len(counts)} examples were trained on more than once. This is a bug: "
                f"report it with run.json and config.yaml."
            )
        self._counts = torch.zeros_like(counts)
        return {"audit/unique": unique, "audit/duplicate": duplicate, "audit/dropped": len(counts) - unique}

    def _count(self) -> None:
        count_into(self._counts, self._gathered)  # a streamed batch's indices lie on the CPU
        self._gathered.clear()
