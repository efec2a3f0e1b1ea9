"""Exact loss and accuracy of one split: every example counted once, for any world size."""

from __future__ import annotations

import logging
import math

import torch
from torch import nn

from dist_train.agreement import Agreement
from dist_train.data.evaluation_batches import EvaluationBatches
from dist_train.distributed import World
from dist_train.errors import DistTrainError, TrainingDiverged, UserCodeError
from dist_train.generators import seeding_for
from dist_train.metrics import Counts
from dist_train.objective import Objective, count_correct

_log = logging.getLogger(__name__)


@torch.no_grad()
def evaluate(
    net: nn.Module,
    batches: EvaluationBatches,
    objective: Objective,
    world: World,
    agreement: Agreement | None = None,
) -> dict[str, float] | None:
    """Mean loss (nats), accuracy (0..1), `seen` and the net's own metrics, every example of the split counted once.

    None if the ranks agreed to stop before it was done. `net` is the bare module, not the one wrapped by DDP: shards
    differ by one example, and a wrapped forward is a collective.

    Collective: every rank must call this.

    Raises:
        DistTrainError: the ranks together did not see just the whole split.
        TrainingDiverged: on every rank, if the loss is not finite.
    """
    world.broadcast([buffer for buffer in net.buffers() if buffer.numel()])
    was_training = net.training
    net.eval()
    counts: Counts | None = None
    seed_generators = seeding_for(net, training=False)
    stream = iter(batches)
    try:
        for _ in range(batches.num_batches):
            batch = next(stream, None)  # a rank's shard may end a batch before the longest one
            if batch is not None:
                seed_generators(batches.seed_of(batch))
                with world.accelerator.autocast():
                    output = objective.forward(net, batch.inputs)
                loss = objective.loss(output, batch.targets)
                own = objective.metrics(output, batch.targets)
                counts = counts or Counts(world.device, tuple(own))
                if tuple(own) != counts.names[3:]:
                    raise UserCodeError(
                        f"metrics(output, target) returned {', '.join(own) or 'nothing'} for one batch and "
                        f"{', '.join(counts.names[3:]) or 'nothing'} for another. Return the same keys each time."
                    )
                counts.add(loss, count_correct(output, batch.targets), len(batch), *own.values())
            if agreement is not None:
                agreement.tick("evaluate")
                if agreement.stop:
                    return None
    finally:
        net.train(was_training)

    # A rank without examples knows neither the net's own metrics nor whether it classifies: rank zero always has some.
    names, classifies = world.from_rank_zero((counts.names, counts.classifies) if counts else ((), True))
    totals = (counts or Counts(world.device, names[3:])).totals(world)
    seen = round(totals["seen"])
    if seen != batches.num_examples:
        raise DistTrainError(f"Evaluation counted {seen} examples of {batches.num_examples}. This is a bug: report it.")
    means = {name: totals[name] / seen for name in names if name not in ("correct", "seen")}
    if not math.isfinite(means["loss"]):
        raise TrainingDiverged(f"The loss over {seen} examples is not finite. Lower optimizer.lr or set max_grad_norm.")
    undefined = [name for name, mean in means.items() if not math.isfinite(mean)]
    for name in undefined:
        del means[name]  # metrics.jsonl is strict JSON
    if undefined:
        _log.warning("left out, since not finite over %d examples: %s", seen, ", ".join(undefined))
    accuracy = {"accuracy": totals["correct"] / seen} if classifies else {}
    return means | accuracy | {"seen": seen}
