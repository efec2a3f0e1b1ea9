"""`per_device_batch_size: auto`: the largest micro-batch that fits the memory of every rank's device."""

from __future__ import annotations

import gc
import logging

import torch
from torch import nn

from dist_train.config.batch_plan import BatchPlan
from dist_train.config.schema import Config
from dist_train.data.batches import training_batches
from dist_train.data.sampler import ShardSampler
from dist_train.data.sets.image_set import num_examples
from dist_train.data.splits import Splits
from dist_train.distributed.devices import is_out_of_memory
from dist_train.distributed.world import World
from dist_train.errors import OutOfMemory
from dist_train.models.invariance import world_size_dependent_layers
from dist_train.models.registry import build_model
from dist_train.models.tasks.losses import loss_for
from dist_train.models.tasks.objective import Objective
from dist_train.training.step.optimizers import build_optimizer

_log = logging.getLogger(__name__)

_MARGIN = 0.1  # of a GPU's memory: for fragments, and for what only a training needs
_MOST_ON_CPU = 1024  # larger ones gain nothing there, and a CPU out of memory kills the process instead of failing


def plan_of(config: Config, world: World, splits: Splits, recorded: int | None) -> BatchPlan:
    """Return how the global batch is divided. With `auto` a micro-batch has `recorded` examples, or as many as fit.

    Collective: every rank must call this.

    Raises:
        OutOfMemory: not even one example fits.
    """
    if config.per_device_batch_size != "auto":
        return BatchPlan.of(config, world.size)
    if recorded is not None:
        return BatchPlan.fit(config.global_batch_size, recorded, world.size)
    return _largest_that_fits(config, world, splits)


def _largest_that_fits(config: Config, world: World, splits: Splits) -> BatchPlan:
    """Collective: every rank must call this."""
    most = config.global_batch_size if world.device.type == "cuda" else _MOST_ON_CPU
    plan: BatchPlan | None = BatchPlan.fit(config.global_batch_size, most, world.size)
    while plan is not None:
        dependent = _try(config, world, splits, plan)
        fails = torch.tensor(1.0 if dependent is None else 0.0, device=world.device)
        if not world.all_reduce(fails, op="max").item():
            _log.info(
                "per_device_batch_size=auto: %d of the %d examples of a process fit, which resumes keep%s",
                plan.per_device_batch_size, plan.per_rank_batch_size,
                f"; it is part of the result: {', '.join(dependent)}" if dependent else "",
            )  # fmt: skip
            return plan
        plan = plan.with_smaller_forwards()
    raise OutOfMemory("Out of memory with per_device_batch_size=auto: not even one example fits. Use a smaller net.")


def _try(config: Config, world: World, splits: Splits, plan: BatchPlan) -> list[str] | None:
    """Try a step. Return what makes its result depend on the size of the micro-batch; None if it does not fit."""
    try:
        return _step(config, world, splits, plan)
    except Exception as error:
        return None if is_out_of_memory(error) else []  # any other error is left to the training, which explains it
    finally:
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()


def _step(config: Config, world: World, splits: Splits, plan: BatchPlan) -> list[str]:
    """Take a step without DDP, which would wait for ranks that are out of memory, but with the memory that it needs."""
    sampler = ShardSampler(num_examples(splits.train), plan, world.rank, config.seed, splits.sample_weights)
    net = build_model(config.model, splits.input_spec, config.seed).to(world.device)
    margin = torch.empty(_margin(world.device), dtype=torch.uint8, device=world.device)
    copies = int(world.size > 1) + int(config.ema_decay is not None)
    reserved = [torch.empty_like(parameter) for parameter in net.parameters() for _ in range(copies)]
    objective = Objective(net, loss_for(net, config, splits, world.device))
    optimizer = build_optimizer(config.optimizer, net, world.device)
    batch = training_batches(splits.train, sampler, config.data, world.device, config.seed).at(0, 0)
    with world.accelerator.autocast():
        output = objective.forward(net, batch.inputs)
    objective.loss(output, batch.targets).backward()
    nn.utils.get_total_norm([each.grad for each in net.parameters() if each.grad is not None])
    optimizer.step()
    world.synchronize()
    del reserved, margin
    return world_size_dependent_layers(net)


def _margin(device: torch.device) -> int:
    """Return the bytes that stay free."""
    return int(_MARGIN * torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else 0
