"""Check a run of any world size without starting it: the batch plan, the examples it covers, the memory it needs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dist_train.checkpoints.disk_space import CheckpointSize
from dist_train.config.batch_plan import BatchPlan
from dist_train.config.schema import Config
from dist_train.data.resident_set import tensors_of
from dist_train.data.sampler import ShardSampler, count_into, evaluation_shard
from dist_train.data.sets.image_set import num_examples
from dist_train.data.splits import load_splits
from dist_train.distributed.devices import default_dtype
from dist_train.errors import DistTrainError
from dist_train.models.registry import build_model


def simulate(config: Config, world_size: int) -> Iterator[str]:
    """Yield lines of text. The shards are those that the ranks would take, and every index is counted.

    Raises:
        ConfigError: the batch cannot be divided among `world_size` processes.
        DistTrainError: the ranks do not take the examples of the epoch's order, each once unless they are drawn.
    """
    plan = BatchPlan.of(config, world_size)
    yield plan.describe()
    splits = load_splits(config.data, config.seed, 1)
    sampler = ShardSampler(num_examples(splits.train), plan, 0, config.seed, splits.sample_weights)
    taken = _taken(sampler, world_size)
    unique, again, unseen = int((taken > 0).sum()), int((taken > 1).sum()), int((taken == 0).sum())
    how = f"once, {unseen} dropped, {again} twice"
    if sampler.replaces:
        how = f"in {sampler.total_size} draws with replacement, {again} more than once, {unseen} never"
    yield f"an epoch: {sampler.steps_per_epoch} steps, {unique} of {sampler.num_examples} examples {how}"
    if not torch.equal(taken, sampler.times_held(0)) or (again and not sampler.replaces):
        raise DistTrainError("The ranks would not take the examples of the epoch's order. This is a bug: report it.")
    for name, split in (("validation", splits.val), ("test", splits.test)):
        if split is not None:
            total = num_examples(split)
            shards = [evaluation_shard(total, rank, world_size) for rank in range(world_size)]
            sizes = sorted({len(shard) for shard in shards})
            assert torch.equal(torch.cat(shards).sort().values, torch.arange(total))
            yield f"{name}: {total} examples, each on one process, {' or '.join(map(str, sizes))} per process"
    with default_dtype(config):
        net = build_model(config.model, splits.input_spec, config.seed)
    size = CheckpointSize.of(net, config)
    gradients = sum(parameter.nbytes for parameter in net.parameters() if parameter.requires_grad)
    needed = size.weights * (2 if config.ema_decay else 1) + gradients + size.optimizer
    resident = tensors_of(splits.train)
    data = resident[0].nbytes if resident else 0
    yield (
        f"memory per process: {needed / 2**20:.1f} MiB of weights, gradients, optimizer state and averages, "
        f"{data / 2**20:.1f} MiB of resident inputs, and the activations of {plan.per_device_batch_size} examples"
    )


def _taken(sampler: ShardSampler, world_size: int) -> Tensor:
    """Return how often each example is taken in the first epoch, over all ranks: int64 [num_examples]."""
    taken = torch.zeros(sampler.num_examples, dtype=torch.int64)
    for rank in range(world_size):
        sampler.rank = rank  # all share one order
        count_into(taken, [sampler.indices(step) for step in range(sampler.steps_per_epoch)])
    return taken
