"""The losses of the three tasks: cross-entropy, binary cross-entropy, mean squared error and Huber's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_train.config.schema import Config
from dist_train.data.class_weights import class_weights
from dist_train.data.sets.image_set import describe_value
from dist_train.data.splits import Splits
from dist_train.errors import ConfigError, UserCodeError

_IGNORE_NOTHING = -(2**31)  # torch's default, -100, would silently ignore labels of -100
_LABEL_DTYPES = (torch.int64, torch.uint8)  # accepted by cross-entropy


class TargetMismatch(UserCodeError):
    """Output and targets for which the loss is not defined."""

    def __init__(self, text: str, row: int | None = None) -> None:
        super().__init__(text)
        self.row = row  # the invalid row of the micro-batch, if it is known


class Loss(Protocol):
    """A loss that is a mean over examples, whose weights may differ."""

    ignores: bool  # whether some labels are left out, so that there is no accuracy over all examples

    def __call__(self, output: Any, targets: Any) -> Tensor:
        """Return the mean over the micro-batch of weight x loss, [].

        Divide by the mean weight of the whole batch, of which this may be a part.
        """

    def mean_weight(self, targets: Tensor) -> Tensor | None:
        """Return the mean weight over the micro-batch, [], in the default dtype; None if all weights are 1."""

    def check(self, net: str, output: Any, targets: Any) -> None:
        """Check that output and targets fit together. `net` names its class. Waits for the device.

        Raises:
            TargetMismatch: they do not.
        """

    def check_labels(self, net: str, output: Tensor, labels: Tensor) -> None:
        """Check the values of labels of any shape. Waits for the device of the labels.

        Raises:
            TargetMismatch: a label is out of range.
        """

    def doubt(self, net: str, output: Tensor) -> str:
        """Return a warning if this loss, which takes logits, seems to be given probabilities; else ""."""


class CrossEntropy:
    """Cross-entropy (nats) of logits [B, K, ...] and labels [B, ...] or class probabilities [B, K, ...]."""

    def __init__(
        self, label_smoothing: float = 0.0, class_weights: Tensor | None = None, ignore_index: int | None = None
    ) -> None:
        """`class_weights`: [K], on the device."""
        self.ignores = ignore_index is not None
        self._weighs = class_weights is not None or self.ignores
        self._label_smoothing = label_smoothing
        self._class_weights = class_weights
        # Ignored labels reduce the number of examples in the mean and give micro-batches unequal weights.
        self._ignore_index = _IGNORE_NOTHING if ignore_index is None else ignore_index

    def __call__(self, output: Any, targets: Any) -> Tensor:
        loss = functional.cross_entropy(
            output,
            targets,
            self._class_weights,
            label_smoothing=self._label_smoothing,
            ignore_index=self._ignore_index,
            reduction="sum" if self._weighs else "mean",
        )
        return loss / targets.numel() if self._weighs else loss

    def mean_weight(self, targets: Tensor) -> Tensor | None:
        if not self._weighs:
            return None
        labels = targets.long()  # uint8 has no negative numbers to compare with
        counts = labels != self._ignore_index
        if self._class_weights is None:
            return counts.to(torch.get_default_dtype()).mean()
        return (self._class_weights[torch.where(counts, labels, 0)] * counts).mean()

    def check(self, net: str, output: Any, targets: Any) -> None:
        fix = f"give {net} a method loss(output, target)"
        if not isinstance(output, Tensor) or output.ndim < 2 or output.shape[1] < 2:
            how = (
                "Set task=regression if it predicts numbers" if isinstance(output, Tensor) else "Return only the logits"
            )
            raise TargetMismatch(
                f"{net} returns {describe_value(output)}, but cross-entropy needs logits [B, K > 1]. {how}, or {fix}."
            )
        weights = self._class_weights
        if weights is not None and len(weights) != output.shape[1]:
            raise TargetMismatch(
                f"class_weights has {len(weights)} numbers, but {net} has {output.shape[1]} classes. Give each one."
            )
        probabilities = isinstance(targets, Tensor) and targets.is_floating_point() and targets.shape == output.shape
        if probabilities and not self._weighs:
            return
        shape = [len(output), *output.shape[2:]]
        if not isinstance(targets, Tensor) or targets.dtype not in _LABEL_DTYPES or list(targets.shape) != shape:
            raise TargetMismatch(
                f"The targets are {describe_value(targets)}, but cross-entropy of {describe_value(output)} needs "
                f"labels, int64 {shape}. Make them whole numbers in the data set, set task=regression or "
                f"task=multi_label, or {fix}."
            )
        self.check_labels(net, output, targets)

    def check_labels(self, net: str, output: Tensor, labels: Tensor) -> None:
        if labels.dtype not in _LABEL_DTYPES or not labels.numel():
            return
        low, high = (int(end) for end in labels.aminmax())
        classes = output.shape[1]
        if low >= 0 and high < classes:
            return
        bad = ((labels < 0) | (labels >= classes)) & (labels.long() != self._ignore_index)
        if bad.any():
            position = bad.nonzero()[0].tolist()
            raise TargetMismatch(
                f"label {int(labels[tuple(position)])}, but {net} has {classes} classes, 0 to {classes - 1}. "
                f"Number the labels from 0, or give the net more outputs.",
                row=position[0],
            )

    def doubt(self, net: str, output: Tensor) -> str:
        if output.ndim != 2:
            return ""
        sums = output.detach().sum(dim=1)
        if bool((output >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
            return (
                f"{net} returns probabilities: the rows of its output add up to 1. Cross-entropy needs logits, and "
                f"learns slowly from probabilities. Remove the softmax."
            )
        return ""


class _Elementwise:
    """A mean over all numbers of the output, each compared with the target at its place."""

    ignores = False

    def mean_weight(self, targets: Tensor) -> Tensor | None:
        return None

    def check_labels(self, net: str, output: Tensor, labels: Tensor) -> None:
        pass

    def doubt(self, net: str, output: Tensor) -> str:
        return ""


class BinaryCrossEntropy(_Elementwise):
    """Binary cross-entropy (nats) of logits [B, K] and labels [B, K], each 0 or 1 or a probability."""

    def __call__(self, output: Any, targets: Any) -> Tensor:
        if targets.device.type == "cpu":  # where it costs nothing to look; else `check_labels` has looked on the host
            _check_shares(targets)
        return functional.binary_cross_entropy_with_logits(output, targets.to(output.dtype))

    def check(self, net: str, output: Any, targets: Any) -> None:
        if not isinstance(output, Tensor) or output.ndim < 2:
            raise TargetMismatch(
                f"{net} returns {describe_value(output)}, but task=multi_label needs logits [B, K]. Return only the "
                f"logits, or give {net} a method loss(output, target)."
            )
        if not isinstance(targets, Tensor) or targets.shape != output.shape:
            raise TargetMismatch(
                f"The targets are {describe_value(targets)}, but task=multi_label with an output of "
                f"{describe_value(output)} needs {list(output.shape)}: 0 or 1 for each label of an example. Make them "
                f"so in the data set, or set task=classification if each example has one label."
            )
        _check_shares(targets)

    def check_labels(self, net: str, output: Tensor, labels: Tensor) -> None:
        _check_shares(labels)

    def doubt(self, net: str, output: Tensor) -> str:
        if bool(((output >= 0) & (output <= 1)).all()):
            return (
                f"{net} returns numbers from 0 to 1. Binary cross-entropy needs logits, and learns slowly from "
                f"probabilities. Remove the sigmoid."
            )
        return ""


def _check_shares(targets: Tensor) -> None:
    low, high = (float(end) for end in targets.aminmax())
    if not (low >= 0 and high <= 1):
        bad = ~((targets >= 0) & (targets <= 1))
        raise TargetMismatch(
            f"a label of {float(targets[bad][0]):g}, but task=multi_label needs 0 or 1 for each.",
            row=int(bad.nonzero()[0][0]),
        )


_DISTANCES: dict[str, Callable[..., Tensor]] = {"mse": functional.mse_loss, "huber": functional.huber_loss}


class Distance(_Elementwise):
    """Mean squared error, or Huber's loss with delta 1, of numbers [B] or [B, K]."""

    def __init__(self, name: str) -> None:
        self._function = _DISTANCES[name]

    def __call__(self, output: Any, targets: Any) -> Tensor:
        # Without the same shape, torch would compare each number with every other.
        return self._function(output, targets.reshape(output.shape).to(output.dtype))

    def check(self, net: str, output: Any, targets: Any) -> None:
        if not isinstance(output, Tensor):
            raise TargetMismatch(
                f"{net} returns {describe_value(output)}, but task=regression needs one tensor. Return only that, or "
                f"give {net} a method loss(output, target)."
            )
        # An output [B, 1] fits targets [B].
        shapes = {tuple(output.shape), tuple(output.squeeze(-1).shape) if output.ndim > 1 else tuple(output.shape)}
        if not isinstance(targets, Tensor) or tuple(targets.shape) not in shapes:
            raise TargetMismatch(
                f"The targets are {describe_value(targets)}, but task=regression with an output of "
                f"{describe_value(output)} needs one number for each of its numbers. Give the net as many outputs as a "
                f"target has numbers."
            )


def one_over(weight: Tensor) -> Tensor:
    """Return 1 / weight, and 0 for a weight of 0: then no example counts, and their sum is 0 too."""
    return torch.where(weight > 0, 1 / weight, 0)


def loss_for(net: nn.Module, config: Config, splits: Splits, device: torch.device) -> Loss:
    """Return the loss of `task` with the `class_weights` of the training set: see `loss_of`."""
    return loss_of(net, config, class_weights(config, splits.train, splits.num_classes, device))


def loss_of(net: nn.Module, config: Config, weights: Tensor | None = None) -> Loss:
    """Return the loss of `task`. `weights`: of the classes, [K], on the device.

    Raises:
        ConfigError: the net has a loss of its own, for which a setting of the task's loss has no meaning.
    """
    if getattr(net, "loss", None) is not None:
        defaults = Config.model_fields
        for name in ("loss", "label_smoothing", "class_weights", "ignore_index"):
            if (value := getattr(config, name)) != defaults[name].default:
                raise ConfigError(
                    f"{name}={value} and {type(net).__name__}.loss exclude each other. Leave {name} out, or remove the "
                    f"method."
                )
    if config.task == "multi_label":
        return BinaryCrossEntropy()
    if config.task == "regression":
        return Distance(config.loss or "mse")
    return CrossEntropy(config.label_smoothing, weights, config.ignore_index)
