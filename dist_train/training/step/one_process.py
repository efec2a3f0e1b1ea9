"""Whether one process would be faster: a small net can lose more by the exchange of gradients than it gains."""

from __future__ import annotations

import logging
import math
import time

import torch
from torch import Tensor, nn

from dist_train.models.invariance import is_ours
from dist_train.training.step.eager import EagerUpdate
from dist_train.training.step.forward_effects import same_buffers

_log = logging.getLogger(__name__)
SHORT_PASS_S = 0.05  # in a longer one the exchange is a small part
_PASSES = 5  # the fastest counts: other work of the machine only slows a pass
_CLEAR_GAIN = 1.1


def report_faster_alone(eager: EagerUpdate, step: int, pass_s: float) -> None:
    """Log both times if one process does the passes of a step faster than these processes of one host together.

    `pass_s`: the seconds of one forward and backward. Changes only the gradients. Other nets than ours are not timed:
    a forward of theirs may change its inputs, or wait for the other ranks.

    Collective: every rank must call this.
    """
    world, plan = eager.world, eager.plan
    if world.shared_memory is None or plan.grad_accum_steps > 1 or not is_ours(eager.net):
        return
    batch = eager.batches.at(step, 0)
    inputs, targets = batch.inputs, batch.targets
    are_tensors = isinstance(inputs, Tensor) and isinstance(targets, Tensor)
    if world.slowest(pass_s if are_tensors else math.inf) > SHORT_PASS_S:
        return
    together_s = world.slowest(_fastest_pass(eager, eager.model, inputs, targets))
    threads = world.num_threads * world.size
    alone_s = 0.0
    if world.is_rank_zero:
        torch.set_num_threads(threads)
        alone_s = _fastest_pass(eager, eager.net, *(torch.cat([each] * world.size) for each in (inputs, targets)))
        torch.set_num_threads(world.num_threads)
    alone_s = world.slowest(alone_s)
    if alone_s * _CLEAR_GAIN < together_s:
        _log.info(
            "one process may be faster: forward and backward of %d examples, not compiled, take %.3f ms in one process "
            "with %d threads, and %.3f ms in these %d processes with the exchange of gradients",
            plan.global_batch_size, 1000 * alone_s, threads, 1000 * together_s, world.size,
        )  # fmt: skip


def _fastest_pass(eager: EagerUpdate, model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Return the seconds of the fastest of several passes on one batch."""
    times = []
    with same_buffers(eager.net):
        for _ in range(_PASSES):
            eager.clear_gradients()
            started = time.perf_counter()
            output = eager.objective.forward(model, inputs)
            eager.objective.loss(output, targets).backward()
            times.append(time.perf_counter() - started)
    eager.clear_gradients()
    return min(times)
