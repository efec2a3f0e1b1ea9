"""The metrics of the setting `metrics` over a whole split, by torchmetrics: equal for any number of ranks.

Sums are added up over the ranks in float64. What depends on the order of all predictions, such as auroc, gathers them
on rank zero, in the order of the split. Only rank zero, which always has examples, computes a value.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dist_train.config.metric_names import Task, top_k
from dist_train.config.schema import Config
from dist_train.data.sets.image_set import describe_value
from dist_train.distributed.world import World
from dist_train.errors import ConfigError, DistTrainError
from dist_train.torchvision_compat import import_torchvision

if TYPE_CHECKING:
    from torchmetrics import Metric

_GATHERED = ("auroc", "average_precision")
_MAX_GATHERED = 2**30  # bytes on rank zero


def split_metrics(config: Config, num_examples: int, device: torch.device) -> SplitMetrics | None:
    """Return the metrics of `config` for one pass over a split; None if there are none."""
    return SplitMetrics(config.task, config.metrics, num_examples, device) if config.metrics else None


class SplitMetrics:
    """Collects the outputs of one pass over a split, on the device (on the CPU for MPS, which has no float64)."""

    def __init__(self, task: Task, names: Sequence[str], num_examples: int, device: torch.device) -> None:
        self.names = names
        self._task = task
        self._num_examples = num_examples
        self._device = torch.device("cpu") if device.type == "mps" else device
        self._width = 0  # classes, labels or numbers of an example, until the first batch
        self._summed: dict[str, Metric] = {}
        self._rows: list[Tensor] = []  # float64 [B, 1 + T + K]: index, targets and probabilities

    @torch.no_grad()
    def add(self, output: Any, targets: Any, indices: Tensor) -> None:
        """Add a batch: an output of the net and its targets, as in `check_output`, and indices in the split [B].

        Raises:
            ConfigError: it is none, or has too few classes or too many examples for one of the metrics.
        """
        if not self._width:
            check_output(self._task, self.names, output, targets)
            self._open(output.shape[1] if output.ndim > 1 else 1)
            check_gathered(self._task, self.names, self._num_examples, self._width)
        output, targets = output.to(self._device).double(), targets.to(self._device)
        if self._task == "regression":
            targets = targets.reshape(output.shape).double()
        else:
            targets = targets.long()
            self._check_labels(targets, indices)
        # torchmetrics takes logits for probabilities, and compares them with 0.5, if all of a batch are from 0 to 1.
        predicted = (output > 0).long() if self._task == "multi_label" else output
        for metric in self._summed.values():
            metric.update(predicted, targets)
        if self._gathered:
            probabilities = output.softmax(dim=1) if self._task == "classification" else output.sigmoid()
            head = [indices.to(self._device).unsqueeze(1), targets.view(len(output), -1)]
            self._rows.append(torch.cat([*(each.double() for each in head), probabilities], dim=1))

    def _check_labels(self, labels: Tensor, indices: Tensor) -> None:
        """With its own loss, a net may have labels that are no class indices, and several for each example."""
        low, high = (int(end) for end in labels.aminmax())
        highest = self._width - 1 if self._task == "classification" else 1
        if low < 0 or high > highest:
            raise ConfigError(
                f"metrics={', '.join(self.names)}: there are labels from {low} to {high}, and task={self._task} with "
                f"an output of {self._width} has labels from 0 to {highest}. Set metrics=[], or let the net compute "
                f"its own in metrics(output, target)."
            )
        if self._gathered and len(labels) != len(indices):
            raise ConfigError(
                f"metrics={', '.join(self._gathered)}: there are {len(labels)} labels for {len(indices)} examples, and "
                f"these need one each. Leave them out."
            )

    def totals(self, world: World) -> dict[str, float]:
        """Return the value of each metric over all ranks; NaN where it is not defined.

        Collective: every rank must call this.
        """
        width = world.from_rank_zero(self._width)
        if not self._width:  # a rank without examples takes part with sums of zero
            self._open(width)
        self._add_up(world)
        rows = self._gather_rows(world) if self._gathered else None
        return world.from_rank_zero(self._values(rows) if world.is_rank_zero else {})

    @property
    def _gathered(self) -> list[str]:
        return [name for name in self.names if name in _GATHERED]

    @property
    def _targets(self) -> int:
        """How many targets an example has."""
        return 1 if self._task == "classification" else self._width

    def _open(self, width: int) -> None:
        self._width = width
        for name in self.names:
            if name not in _GATHERED:
                metric = _metric(self._task, name, width)
                check_sums(name, metric)
                self._summed[name] = metric.set_dtype(torch.float64).to(self._device)

    def _add_up(self, world: World) -> None:
        """Collective: every rank must call this."""
        states = [(metric, name, value) for metric in self._summed.values() for name, value in _states(metric)]
        if not states:
            return
        sums = world.all_reduce(torch.cat([value.flatten().double() for _, _, value in states]))
        for (metric, name, value), total in zip(
            states, sums.split([value.numel() for _, _, value in states]), strict=True
        ):
            setattr(metric, name, total.view_as(value).to(value.dtype))

    def _gather_rows(self, world: World) -> Tensor | None:
        """Return the rows of all ranks in the order of the split, [num_examples, 1 + T + K]; None except on rank zero.

        Collective: every rank must call this.
        """
        longest, width = -(-self._num_examples // world.size), 1 + self._targets + self._width
        rows = torch.full((longest, width), -1.0, dtype=torch.float64, device=self._device)
        if self._rows:  # a shard may be one example shorter than the longest; its last row stays at -1
            mine = torch.cat(self._rows)
            rows[: len(mine)] = mine
        gathered = world.gather_to_rank_zero(rows)
        if gathered is None:
            return None
        found = gathered.flatten(0, 1)
        found = found[found[:, 0] >= 0]
        return found[found[:, 0].argsort()]

    def _values(self, rows: Tensor | None) -> dict[str, float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about classes that do not occur
            values = {name: float(metric.compute()) for name, metric in self._summed.items()}
            if rows is not None:
                targets, probabilities = rows[:, 1:].long()[:, : self._targets], rows[:, 1 + self._targets :]
                if self._task == "classification":
                    targets = targets.squeeze(1)
                    positives = torch.bincount(targets, minlength=self._width)
                else:
                    positives = targets.sum(dim=0)
                is_defined = (positives > 0) & (positives < len(rows))
                for name in self._gathered:
                    by_class = _metric(self._task, name, self._width)(probabilities, targets)
                    values[name] = float(by_class[is_defined].mean())
        return {name: values[name] for name in self.names}


def check_output(task: Task, names: Sequence[str], output: Any, targets: Any) -> None:
    """Check that the metrics are defined for an output of the net and its targets.

    Raises:
        ConfigError: they are not as below, or there are too few classes for top5.
    """
    needed, fits = {
        "classification": ("logits [B, K > 1] and labels, int64 [B]", _are_classes),
        "multi_label": ("logits [B, K] and 0 or 1, [B, K]", _are_labels),
        "regression": ("numbers [B] or [B, K], and as many targets", _are_numbers),
    }[task]
    if not (isinstance(output, Tensor) and isinstance(targets, Tensor) and fits(output, targets)):
        raise ConfigError(
            f"metrics={', '.join(names)}: with task={task} they need {needed}, but the net returns "
            f"{describe_value(output)} and the targets are {describe_value(targets)}. Set metrics=[], or let the net "
            f"compute its own in metrics(output, target)."
        )
    for name in names:
        if (top_k(name) or 0) >= (classes := output.shape[-1]):
            raise ConfigError(f"metrics={name}: the net has {classes} classes. Take a number below {classes}.")


def _are_classes(output: Tensor, targets: Tensor) -> bool:
    shapes = output.ndim == 2 and output.shape[1] > 1 and targets.shape == output.shape[:1]
    return shapes and not targets.is_floating_point()


def _are_labels(output: Tensor, targets: Tensor) -> bool:
    return output.ndim == 2 and targets.shape == output.shape


def _are_numbers(output: Tensor, targets: Tensor) -> bool:
    return output.ndim in (1, 2) and targets.numel() == output.numel() and len(targets) == len(output)


def check_gathered(task: Task, names: Sequence[str], num_examples: int, classes: int) -> None:
    """Check that the predictions for a split fit rank zero, for metrics that need all of them there.

    Raises:
        ConfigError: they take more than 1 GiB.
    """
    gathered = [name for name in names if name in _GATHERED]
    numbers = classes + 2 if task == "classification" else 2 * classes + 1  # probabilities, targets and the index
    size = num_examples * numbers * 8
    if gathered and size > _MAX_GATHERED:
        raise ConfigError(
            f"metrics={', '.join(gathered)}: rank 0 would gather {size / 2**30:.1f} GiB, {num_examples} examples x "
            f"{numbers} numbers x 8 bytes; the limit is 1 GiB. Leave {' and '.join(gathered)} out; for the training "
            f"set alone, final_train_eval=false is enough."
        )


def check_sums(name: str, metric: Metric) -> None:
    """Check that a metric is a function of sums over examples, in whatever version of torchmetrics.

    Raises:
        DistTrainError: it keeps something else, whose sum over the ranks would give a wrong value.
    """
    import_torchvision()  # torchmetrics imports it
    from torchmetrics.utilities import dim_zero_sum

    odd = [state for state, reduction in metric._reductions.items() if reduction is not dim_zero_sum]
    if odd:
        raise DistTrainError(
            f"metrics={name}: this torchmetrics keeps its {odd[0]} not as a sum over examples, so that it cannot be "
            f"added up over the ranks. Install torchmetrics 1.9."
        )


def _states(metric: Metric) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in metric.metric_state.items() if isinstance(value, Tensor)]


def _metric(task: Task, name: str, width: int) -> Metric:
    """Return torchmetrics' metric. Its arguments are not validated: `add` checks them, for all metrics at once."""
    import_torchvision()  # torchmetrics imports it
    from torchmetrics import classification, regression

    if task == "regression":
        numbers: dict[str, Callable[..., Metric]] = {
            "mae": regression.MeanAbsoluteError,
            "mse": regression.MeanSquaredError,
            "rmse": lambda **common: regression.MeanSquaredError(squared=False, **common),
            "r2": regression.R2Score,
        }
        return numbers[name](sync_on_compute=False)
    common: Any = {"validate_args": False, "sync_on_compute": False}
    common["num_classes" if task == "classification" else "num_labels"] = width
    if (k := top_k(name)) is not None:
        return classification.MulticlassAccuracy(top_k=k, average="micro", **common)
    prefix = "Multiclass" if task == "classification" else "Multilabel"
    kinds = {
        "f1": "F1Score",
        "precision": "Precision",
        "recall": "Recall",
        "auroc": "AUROC",
        "average_precision": "AveragePrecision",
    }
    kind: type[Metric] = getattr(classification, prefix + kinds[name])
    return kind(average=None if name in _GATHERED else "macro", **common)
