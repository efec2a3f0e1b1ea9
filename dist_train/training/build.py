"""The components of a training that need no run directory: sampler, learning rate, step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from dist_train.config.batch_plan import BatchPlan
from dist_train.config.schema import Config
from dist_train.data.batches import training_batches
from dist_train.data.sampler import ShardSampler
from dist_train.data.sets.image_set import num_examples
from dist_train.data.splits import Splits
from dist_train.distributed.world import World
from dist_train.models.registry import build_model
from dist_train.training.step.lr_schedule import LearningRate
from dist_train.training.step.train_step import Step


@dataclass(frozen=True)
class Components:
    sampler: ShardSampler
    learning_rate: LearningRate
    step: Step


def build_components(
    config: Config, world: World, splits: Splits, change: Callable[[nn.Module], None] = lambda net: None
) -> Components:
    """Build the components. `change` may modify the net before anything else holds a reference to it.

    Collective: every rank must call this.
    """
    plan = BatchPlan.fit(config.global_batch_size, config.per_device_batch_size, world.size)
    sampler = ShardSampler(num_examples(splits.train), plan, world.rank, config.seed)
    learning_rate = LearningRate(
        peak=config.optimizer.scaled_lr(config.global_batch_size),
        total_steps=config.train_for.to_steps(sampler.steps_per_epoch),
        name=config.schedule.name,
        warmup_steps=config.schedule.warmup.to_steps(sampler.steps_per_epoch),
        final_ratio=config.schedule.final_ratio,
    )
    net = build_model(config.model, splits.input_spec, config.seed)
    if config.ddp.sync_batchnorm and world.device.type == "cuda" and world.size > 1:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    change(net)
    batches = training_batches(splits.train, sampler, config.data, world.device, config.seed)
    return Components(sampler, learning_rate, Step(config, world, net, batches, plan, learning_rate))
