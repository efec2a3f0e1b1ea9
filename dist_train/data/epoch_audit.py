"""Which examples an epoch really trained on, over all ranks: each at most once, or the run stops."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dist_train.data.sampler import ShardSampler
from dist_train.distributed.world import World
from dist_train.errors import CheckpointError, DistTrainError

_CHUNK = 256  # batches that are added up together


class ShardAudit:
    """Count and hash of the examples of the epoch under way, from the indices that the updates gathered.

    The hash is the same in any order and however the examples are shared out. It has to be that of the epoch's
    permutation up to there, which holds each example once.
    """

    def __init__(self, sampler: ShardSampler, world: World, step: int, kept: dict[str, int] | None = None) -> None:
        """`kept`: what `totals` said when the run was saved at `step`. An older version kept none: for what it trained
        on in this epoch the sampler has to be believed, and the audit says of how many examples.

        Raises:
            CheckpointError: on every rank, if the epoch began with other examples than this run's order does.
        """
        self._sampler = sampler
        self._world = world
        epoch, steps = divmod(step, sampler.steps_per_epoch)
        count, ordered = self._in_order(epoch, steps)
        if kept and (kept["seen"], kept["hash"]) != (count, ordered):
            raise CheckpointError(
                f"The {kept['seen']} examples of epoch {epoch + 1} trained on before step {step} (hash "
                f"{kept['hash']:x}) are not the first {count} of its order ({ordered:x}): another torch shuffles "
                f"otherwise. Go on with the version that run.json names, or start under another --run-name."
            )
        self._believed = kept["believed"] if kept else count
        # The totals are over all ranks: what was there before is counted by one of them.
        self._seen = count if world.is_rank_zero else 0
        self._hash = torch.full((), ordered if world.is_rank_zero else 0, dtype=torch.int64, device=world.device)
        self._gathered: list[Tensor] = []

    def note(self, indices: Tensor) -> None:
        """int64 [B], of one more batch. Does not wait for the device."""
        self._gathered.append(indices)
        if len(self._gathered) >= _CHUNK:
            self._add_up()

    def totals(self) -> dict[str, int]:
        """Of the epoch under way, over all ranks: what a checkpoint keeps.

        Collective: every rank must call this.
        """
        self._add_up()
        here = torch.stack([torch.full_like(self._hash, self._seen), self._hash])
        seen, found = self._world.all_reduce(here).tolist()
        return {"seen": seen, "hash": found, "believed": self._believed}

    def close_epoch(self, step: int) -> dict[str, int]:
        """How many examples the epoch that `step` belongs to has trained on and how many it dropped; at its last step
        the next begins.

        Collective: every rank must call this.

        Raises:
            DistTrainError: on every rank, if they are others than its order has, or one was trained on twice.
        """
        epoch = math.ceil(step / self._sampler.steps_per_epoch)
        steps = step - (epoch - 1) * self._sampler.steps_per_epoch
        found = self.totals()
        count, ordered = self._in_order(epoch - 1, steps)
        if (found["seen"], found["hash"]) != (count, ordered):
            raise DistTrainError(
                f"Epoch {epoch}: the {found['seen']} examples trained on (hash {found['hash']:x}) are not the first "
                f"{count} of its order, each once ({ordered:x}). This is a bug: report it with run.json and "
                f"config.yaml."
            )
        line = {"audit/unique": count - self._believed, "audit/duplicate": 0}
        if self._believed:
            line["audit/believed"] = self._believed
        if steps == self._sampler.steps_per_epoch:
            self._seen, self._believed = 0, 0
            self._hash.zero_()
        return line | {"audit/dropped": self._sampler.num_examples - count}

    def _in_order(self, epoch: int, steps: int) -> tuple[int, int]:
        """Count and hash of the examples that the order of `epoch` (from 0) has for so many steps, over all ranks."""
        if not steps:
            return 0, 0
        # A copy of the sampler: this one may hold the permutation of the next epoch already.
        order = self._sampler.on(self._world.device).permutation(epoch)
        examples = order[: steps * self._sampler.plan.global_batch_size]
        return len(examples), int(_hash_of(examples))

    def _add_up(self) -> None:
        if self._gathered:
            indices = torch.cat(self._gathered)
            self._gathered.clear()
            self._seen += len(indices)
            self._hash += _hash_of(indices).to(self._hash.device)  # a streamed batch's indices lie on the CPU


def _hash_of(indices: Tensor) -> Tensor:
    """int64 []: the sum, modulo 2**64, of a hash of each index."""
    pieces = [_mixed(piece).sum() for piece in indices.split(2**20)]  # an epoch may have 10**8
    return torch.stack(pieces).sum()


def _mixed(indices: Tensor) -> Tensor:
    """Bits well spread, two never alike: the first round of SplitMix64, in integers that have a sign."""
    mixed = (indices + 1) * -0x61C8864680B583EB
    mixed = (mixed ^ ((mixed >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    return mixed ^ ((mixed >> 27) & (2**37 - 1))
