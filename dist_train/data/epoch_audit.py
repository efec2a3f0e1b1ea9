"""A check of the examples an epoch trained on, over all ranks: those of its order, or the run stops."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dist_train.data.sampler import ShardSampler
from dist_train.distributed.world import World
from dist_train.errors import CheckpointError, DistTrainError

_CHUNK = 256  # batches per summation


class ShardAudit:
    """Count and hash of the current epoch's examples, computed from the indices that the updates gathered.

    The hash depends neither on the order nor on the sharding of the examples. It must equal the hash of the epoch's
    order up to the current step, which holds each example once unless the sampler draws with replacement.
    """

    def __init__(self, sampler: ShardSampler, world: World, step: int, kept: dict[str, int] | None = None) -> None:
        """`kept` is the result of `totals` when the run was saved at `step`. Older versions saved none: the audit then
        trusts the sampler for the earlier part of this epoch and reports for how many examples.

        Raises:
            CheckpointError: on every rank, if the epoch began with other examples than this run's order does.
        """
        self._sampler = sampler
        self._world = world
        epoch, steps = divmod(step, sampler.steps_per_epoch)
        count, expected_hash, _ = self._expected(epoch, steps)
        if kept and (kept["seen"], kept["hash"]) != (count, expected_hash):
            raise CheckpointError(
                f"The {kept['seen']} examples of epoch {epoch + 1} trained on before step {step} (hash "
                f"{kept['hash']:x}) are not the first {count} of its order ({expected_hash:x}): another torch "
                f"version may shuffle differently. Resume with the version named in run.json, or start under another "
                f"--run-name."
            )
        self._unaudited = kept["believed"] if kept else count
        # Totals are summed over ranks, so only one rank counts the earlier examples.
        self._seen = count if world.is_rank_zero else 0
        self._hash = torch.full((), expected_hash if world.is_rank_zero else 0, dtype=torch.int64, device=world.device)
        self._gathered: list[Tensor] = []

    def add(self, indices: Tensor) -> None:
        """Add the indices of a batch, int64 [B]. Does not wait for the device."""
        self._gathered.append(indices)
        if len(self._gathered) >= _CHUNK:
            self._flush()

    def totals(self) -> dict[str, int]:
        """Return the totals of the current epoch over all ranks, as a checkpoint stores them.

        Collective: every rank must call this.
        """
        self._flush()
        local = torch.stack([torch.full_like(self._hash, self._seen), self._hash])
        seen, found = self._world.all_reduce(local).tolist()
        return {"seen": seen, "hash": found, "believed": self._unaudited}

    def close_epoch(self, step: int) -> dict[str, int]:
        """Return how many different examples the epoch of `step` has trained on, how often it took one of them again,
        and how many it has not trained on. At its last step, start the next epoch.

        Collective: every rank must call this.

        Raises:
            DistTrainError: on every rank, if they differ from the epoch's order.
        """
        epoch = math.ceil(step / self._sampler.steps_per_epoch)
        steps = step - (epoch - 1) * self._sampler.steps_per_epoch
        found = self.totals()
        count, expected_hash, again = self._expected(epoch - 1, steps)
        if (found["seen"], found["hash"]) != (count, expected_hash):
            raise DistTrainError(
                f"Epoch {epoch}: the {found['seen']} examples trained on (hash {found['hash']:x}) are not the first "
                f"{count} of its order ({expected_hash:x}). This is a bug: report it with run.json and config.yaml."
            )
        line = {"audit/unique": count - self._unaudited - again, "audit/duplicate": again}
        if self._unaudited:
            line["audit/believed"] = self._unaudited
        if steps == self._sampler.steps_per_epoch:
            self._seen, self._unaudited = 0, 0
            self._hash.zero_()
        return line | {"audit/dropped": self._sampler.num_examples - count + again}

    def _expected(self, epoch: int, steps: int) -> tuple[int, int, int]:
        """Return count and hash of the first `steps` steps in the order of `epoch` (from 0), over all ranks, and how
        often they hold an example again.
        """
        if not steps:
            return 0, 0, 0
        # Use a copy: this sampler may already hold the order of the next epoch.
        order = self._sampler.on(self._world.device).order(epoch)
        examples = order[: steps * self._sampler.plan.global_batch_size]
        again = len(examples) - len(examples.unique()) if self._sampler.replaces else 0
        return len(examples), int(_hash_sum(examples)), again

    def _flush(self) -> None:
        if self._gathered:
            indices = torch.cat(self._gathered)
            self._gathered.clear()
            self._seen += len(indices)
            self._hash += _hash_sum(indices).to(self._hash.device)  # a streamed batch's indices are on the CPU


def _hash_sum(indices: Tensor) -> Tensor:
    """Return the sum, modulo 2**64, of a hash of each index: int64 []."""
    pieces = [_mix(piece).sum() for piece in indices.split(2**20)]  # an epoch may have 10**8
    return torch.stack(pieces).sum()


def _mix(indices: Tensor) -> Tensor:
    """Mix the bits of each index with a bijection: the first round of SplitMix64 in signed integers."""
    mixed = (indices + 1) * -0x61C8864680B583EB
    mixed = (mixed ^ ((mixed >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    return mixed ^ ((mixed >> 27) & (2**37 - 1))
