"""Exact evaluation of one split: every example counts once, for any world size."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.data.evaluation_batches import EvaluationBatches
from dist_train.data.sets.image_set import Examples, describe_value
from dist_train.distributed.world import World
from dist_train.errors import ConfigError, DataError, DistTrainError, TrainingDiverged, UserCodeError
from dist_train.models.invariance import seeding_for
from dist_train.models.tasks.confusion import Confusion
from dist_train.models.tasks.objective import ErrorContext, Objective
from dist_train.models.tasks.split_metrics import SplitMetrics
from dist_train.runs.accuracy_text import IS_OWN
from dist_train.training.agreement import Agreement
from dist_train.training.step.counts import Counts

_log = logging.getLogger(__name__)

_MAX_PENDING = 2**18  # output elements that are scored together
_WEIGHT = "mean weight"  # of the examples in the loss; not the name of a metric of the net's own, which has no space


@torch.no_grad()
def evaluate(
    net: nn.Module,
    batches: EvaluationBatches,
    objective: Objective,
    world: World,
    agreement: Agreement | None = None,
    confusion: Confusion | None = None,
    metrics: SplitMetrics | None = None,
) -> dict[str, float] | None:
    """Return mean loss (nats), accuracy (0..1), `seen`, the `metrics` by torchmetrics and the net's own metrics.

    Each example is counted once. A metric that is not finite is logged by name; callers omit it from files, as JSON has
    no NaN. Where there are no classes to count, `accuracy` may be such a metric; `IS_OWN` then stands beside it.
    `confusion` receives each batch that is classified.
    Returns None if the ranks agreed to stop before the end. `net` is the bare module, not the one wrapped by DDP:
    shards differ by one example, and a wrapped forward is a collective.

    Collective: every rank must call this.

    Raises:
        DistTrainError: the number of examples that all ranks counted is not the size of the split.
        TrainingDiverged: on every rank, if the loss is not finite.
    """
    world.broadcast([buffer for buffer in net.buffers() if buffer.numel()])
    sums = _Sums(net, batches.examples, objective, world.device, confusion, metrics)
    seed_generators = seeding_for(net, training=False)
    stream = iter(batches)
    with _eval_mode(net):
        for _ in range(batches.num_batches):
            batch = next(stream, None)  # a rank's shard may be one batch shorter than the longest
            if batch is not None:
                seed_generators(batches.seed_of(batch))
                views = batches.other_views(batch)  # made before a net may change the inputs in place
                with sums.error_context(batch.indices), world.accelerator.autocast():
                    output = objective.forward(net, batch.inputs)
                    objective.check_labels(output, batch.labels)
                    of_views = [(weight, objective.forward(net, view)) for weight, view in views]
                sums.add(output, batch.targets, batch.indices, _mean_output(objective, output, batch.targets, of_views))
            if agreement is not None:
                agreement.tick("evaluate")
                if agreement.stop:
                    return None
    return _means_over_ranks(sums.counted(), metrics, batches.num_examples, world)


@contextmanager
def _eval_mode(net: nn.Module) -> Iterator[None]:
    """Put the net into evaluation mode inside. Afterwards each layer is as before: some, as frozen ones, may stay."""
    modes = [(module, module.training) for module in net.modules()]
    was_training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(was_training)  # a net's own `train` may do more than set the mode
        for module, mode in modes:
            module.training = mode


def _means_over_ranks(
    counts: Counts | None, metrics: SplitMetrics | None, num_examples: int, world: World
) -> dict[str, float]:
    """Add up the sums of all ranks (None: a rank without examples), and divide last.

    Collective: every rank must call this.
    """
    # A rank without examples knows neither the net's own metrics nor whether it classifies. Rank zero always has some.
    names, classifies = world.from_rank_zero((counts.names, counts.classifies) if counts else ((), True))
    totals = (counts or Counts(world.device, names[3:])).totals(world)
    seen = round(totals["seen"])
    if seen != num_examples:
        raise DistTrainError(f"Evaluation counted {seen} examples of {num_examples}. This is a bug: report it.")
    means = {name: totals[name] / seen for name in names if name not in ("correct", "seen", _WEIGHT)}
    if _WEIGHT in names:
        if not totals[_WEIGHT]:
            raise DataError(f"None of the {seen} examples counts in the loss: see ignore_index and class_weights.")
        means["loss"] = totals["loss"] / totals[_WEIGHT]
    if not math.isfinite(means["loss"]):
        raise TrainingDiverged(f"The loss over {seen} examples is not finite. Lower optimizer.lr or set max_grad_norm.")
    if metrics is not None:
        means |= metrics.totals(world)
    undefined = [name for name, mean in means.items() if not math.isfinite(mean)]
    if undefined:
        _log.warning("metrics omitted, not finite over %d examples: %s", seen, ", ".join(undefined))
    if classifies:
        means["accuracy"] = totals["correct"] / seen
    elif math.isfinite(means.get("accuracy", math.nan)):
        means[IS_OWN] = 1
    return means | {"seen": seen}


def _check_accuracy(theirs: float, ours: float) -> None:
    """Reject a user metric `accuracy` that differs from ours, which is reported and selects the best checkpoint."""
    if not math.isclose(theirs, ours, abs_tol=1e-4):
        raise UserCodeError(
            f"metrics(output, target) returned accuracy={theirs:.6g} for a batch whose accuracy is {ours:.6g}, as "
            f"counted from logits [B, K] and labels [B]. Give the metric another name."
        )


def _mean_output(objective: Objective, output: Any, targets: Any, of_views: list[tuple[float, Any]]) -> Tensor | None:
    """Return the weighted mean of the outputs of all views of a batch, [B, K]; None without other views.

    Raises:
        ConfigError: there are no classes to count.
    """
    if not of_views:
        return None
    if objective.correct(output, targets) is None:
        raise ConfigError(
            f"data.tta counts the classes of logits [B, K] and labels [B], and these are {describe_value(output)} and "
            f"{describe_value(targets)}. Remove data.tta; the run can be resumed without it."
        )
    mean: Tensor = (1 - sum(weight for weight, _ in of_views)) * output
    for weight, each in of_views:
        mean = mean + weight * each
    return mean


class _Sums:
    """Sums over a split's outputs. Small outputs of a classifier are scored together: one operation instead of ten."""

    def __init__(
        self,
        net: nn.Module,
        examples: Examples,
        objective: Objective,
        device: torch.device,
        confusion: Confusion | None,
        metrics: SplitMetrics | None,
    ) -> None:
        self._net = net
        self._examples = examples
        self._objective = objective
        self._device = device
        self._confusion = confusion
        self._metrics = metrics
        self._counts: Counts | None = None  # None until the first batch
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []
        self._pending_means: list[Tensor] = []
        self._num_pending = 0  # output elements in `_pending`

    def error_context(self, indices: Tensor) -> ErrorContext:
        """Return a context that reports an error of the net or its loss on these examples in one line."""
        return ErrorContext(self._net, "in evaluation", indices, self._examples)

    def add(self, output: Any, targets: Any, indices: Tensor, mean_output: Tensor | None) -> None:
        """Add a batch. `mean_output`: over all views of it, if there are others than the batch itself."""
        tensors = isinstance(output, Tensor) and isinstance(targets, Tensor)
        if not (self._objective.is_plain and tensors and output.ndim == 2 and targets.ndim == 1):
            self._score(output, targets, indices, mean_output)
            return
        self._pending.append((output, targets, indices))
        if mean_output is not None:
            self._pending_means.append(mean_output)
        self._num_pending += output.numel()
        if self._num_pending >= _MAX_PENDING:
            self._score_pending()

    def counted(self) -> Counts | None:
        """Return the sums over all outputs, None if there were none."""
        self._score_pending()
        return self._counts

    def _score_pending(self) -> None:
        if self._pending:
            outputs, targets, indices = zip(*self._pending, strict=True)
            mean_output = torch.cat(self._pending_means) if self._pending_means else None
            self._pending, self._pending_means, self._num_pending = [], [], 0
            self._score(torch.cat(outputs), torch.cat(targets), torch.cat(indices), mean_output)

    def _score(self, output: Any, targets: Any, indices: Tensor, mean_output: Tensor | None) -> None:
        with self.error_context(indices):
            loss, own = self._objective.loss(output, targets), self._objective.metrics(output, targets)
        if mean_output is not None:
            if "accuracy_tta" in own:
                raise UserCodeError(
                    "metrics(output, target) returned accuracy_tta, which data.tta counts itself. Give it another name."
                )
            own["accuracy_tta"] = int((mean_output.argmax(dim=1) == targets).sum()) / len(indices)
        if (weight := self._objective.mean_weight(targets)) is not None:
            own = {_WEIGHT: float(weight)} | own
        counts = self._counts = self._counts or Counts(self._device, tuple(own))
        if tuple(own) != counts.names[3:]:
            raise UserCodeError(
                f"metrics(output, target) returned {', '.join(own) or 'nothing'} for one batch and "
                f"{', '.join(counts.names[3:]) or 'nothing'} for another. Return the same keys each time."
            )
        asked = self._metrics.names if self._metrics is not None else ()
        if twice := [name for name in asked if name in own]:
            raise UserCodeError(
                f"metrics(output, target) returned {twice[0]}, and metrics={twice[0]} asks torchmetrics for one so "
                f"named. Give yours another name, or leave it out of the setting."
            )
        correct = self._objective.correct(output, targets)
        if correct is not None and "accuracy" in own:
            _check_accuracy(own["accuracy"], int(correct) / len(indices))
        if self._confusion is not None and correct is not None:
            self._confusion.add(output, targets, indices)
        if self._metrics is not None:
            self._metrics.add(output, targets, indices)
        counts.add(loss, correct, len(indices), *own.values())
