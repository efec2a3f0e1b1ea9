"""Loss and metrics: the net's own methods `loss` and `metrics`, else cross-entropy and accuracy."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_train.data.loader import loader_error
from dist_train.data.sets.image_set import Examples, describe_example, describe_value
from dist_train.data.transforms import change_each
from dist_train.distributed.devices import is_device_assert, is_out_of_memory
from dist_train.distributed.peer_failures import is_peer_failure
from dist_train.errors import ConfigError, UserCodeError
from dist_train.user_code.importing import wrap_user_errors

_IGNORE_NOTHING = -(2**31)  # torch's default, -100, would silently ignore labels of -100
_LABEL_DTYPES = (torch.int64, torch.uint8)  # accepted by cross-entropy


class TargetMismatch(UserCodeError):
    """Output and targets for which cross-entropy is not defined."""

    def __init__(self, text: str, row: int | None = None) -> None:
        super().__init__(text)
        self.row = row  # the invalid row of the micro-batch, if it is known


class ErrorContext(AbstractContextManager[None]):
    """Turns errors of a net, its loss or cross-entropy on the examples at `indices` [B] into one line.

    A class and not a generator: it is entered at each micro-step and takes 0.6 us, a generator takes 2 us.
    """

    def __init__(self, net: nn.Module, when: str, indices: Tensor, examples: Examples) -> None:
        self._net = net
        self._when = when
        self._indices = indices
        self._examples = examples

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, TargetMismatch):
            row = error.row
            whose = "" if row is None else f"{describe_example(self._examples, int(self._indices[row]))} has "
            raise UserCodeError(f"{whose}{error}") from error
        if error is not None:
            with wrap_user_errors(type(self._net).__name__, f"failed {self._when}", pass_through=_is_not_of_the_net):
                raise error


def _is_not_of_the_net(error: BaseException) -> bool:
    checks = (is_peer_failure, is_out_of_memory, is_device_assert, loader_error)
    return any(check(error) for check in checks)


class Objective:
    """The forward call, loss and metrics of one net.

    `net` is the user's module; the module passed to `forward` may be wrapped (DDP) or averaged (EMA).
    """

    def __init__(self, net: nn.Module, label_smoothing: float = 0.0) -> None:
        self._name = type(net).__name__
        self._own_loss = getattr(net, "loss", None)
        self._own_metrics = getattr(net, "metrics", None)
        self._label_smoothing = label_smoothing
        if self._own_loss and label_smoothing:
            raise ConfigError(
                f"label_smoothing={label_smoothing} and {type(net).__name__}.loss exclude each other. "
                f"Set label_smoothing=0."
            )
        # A net with one required argument gets a list or tuple of inputs unchanged; with several it is unpacked.
        parameters = inspect.signature(type(net).forward).parameters.values()
        required = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
        self._unpack = len(required) > 2 or any(p.kind is p.VAR_POSITIONAL for p in required)

    @property
    def is_plain(self) -> bool:
        """Whether loss and metrics are ours: for merged batches they are the mean of those of each batch."""
        return self._own_loss is None and self._own_metrics is None

    def forward(self, model: nn.Module, inputs: Any) -> Any:
        """Return the output for a micro-batch; for a classifier logits [B, K].

        Half precision is converted to float32: metrics computed from it would be rounded to two digits.
        """
        output = model(*inputs) if self._unpack and isinstance(inputs, (list, tuple)) else model(inputs)
        return change_each(_to_float32, output) if _has_half(output) else output

    def loss(self, output: Any, targets: Any) -> Tensor:
        """Return the mean loss over the micro-batch, [] (nats for cross-entropy)."""
        if self._own_loss is None:
            # Ignored labels would reduce the number of examples in the mean and give micro-batches unequal weights.
            try:
                return functional.cross_entropy(
                    output, targets, label_smoothing=self._label_smoothing, ignore_index=_IGNORE_NOTHING
                )
            except (IndexError, RuntimeError, TypeError, ValueError):
                self.check(output, targets)
                raise
        loss = self._own_loss(output, targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UserCodeError(f"loss(output, target) must return one number, the mean over the batch; got {got}.")
        return loss.reshape(())

    def check(self, output: Any, targets: Any) -> None:
        """Check that cross-entropy accepts output and targets, unless the net has its own loss. Waits for the device.

        Raises:
            TargetMismatch: it does not accept them.
        """
        if self._own_loss is not None:
            return
        fix = f"give {self._name} a method loss(output, target)"
        if not isinstance(output, Tensor) or output.ndim < 2 or output.shape[1] < 2:
            raise TargetMismatch(
                f"{self._name} returns {describe_value(output)}, but cross-entropy needs logits [B, K > 1]. Return "
                f"only the logits, or {fix}."
            )
        if isinstance(targets, Tensor) and targets.is_floating_point() and targets.shape == output.shape:
            return  # class probabilities
        shape = [len(output), *output.shape[2:]]
        if not isinstance(targets, Tensor) or targets.dtype not in _LABEL_DTYPES or list(targets.shape) != shape:
            raise TargetMismatch(
                f"The targets are {describe_value(targets)}, but cross-entropy of {describe_value(output)} needs "
                f"labels, int64 {shape}. Make them whole numbers in the data set, or {fix}."
            )
        self.check_labels(output, targets)

    def doubt(self, output: Any) -> str:
        """Return a warning if cross-entropy, which takes logits, seems to be given probabilities [B, K]; else ""."""
        if self._own_loss is not None or not isinstance(output, Tensor) or output.ndim != 2:
            return ""
        sums = output.detach().sum(dim=1)
        if bool((output >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
            return (
                f"{self._name} returns probabilities: the rows of its output add up to 1. Cross-entropy needs logits, "
                f"and learns slowly from probabilities. Remove the softmax."
            )
        return ""

    def check_labels(self, output: Any, labels: Tensor | None) -> None:
        """Check that labels of any shape are class indices of the net. Waits for the device of the labels.

        Raises:
            TargetMismatch: a label is out of range.
        """
        if labels is None or self._own_loss is not None or not isinstance(output, Tensor):
            return
        if labels.dtype not in _LABEL_DTYPES or not labels.numel():
            return
        low, high = (int(end) for end in labels.aminmax())
        classes = output.shape[1]
        if low < 0 or high >= classes:
            position = ((labels < 0) | (labels >= classes)).nonzero()[0].tolist()
            raise TargetMismatch(
                f"label {int(labels[tuple(position)])}, but {self._name} has {classes} classes, 0 to {classes - 1}. "
                f"Number the labels from 0, or give the net more outputs.",
                row=position[0],
            )

    def metrics(self, output: Any, targets: Any) -> dict[str, float]:
        """Return the net's own metrics, means over the micro-batch. For evaluation only: it may wait for the device."""
        if self._own_metrics is None:
            return {}
        values = self._own_metrics(output, targets)
        if not isinstance(values, dict):
            raise UserCodeError(f"metrics(output, target) must return a dict of numbers; got {type(values).__name__}.")
        reserved = values.keys() & {"loss", "correct", "seen"}
        if reserved:
            names = ", ".join(sorted(reserved))
            raise UserCodeError(f"metrics(output, target) must not return {names}: dist_train counts that itself.")
        return {str(name): float(value) for name, value in values.items()}


_HALF = (torch.bfloat16, torch.float16)


def _to_float32(item: Any) -> Any:
    return item.float() if getattr(item, "dtype", None) in _HALF else item


def _has_half(output: Any) -> bool:
    if isinstance(output, Tensor):
        return output.dtype in _HALF
    values = output.values() if isinstance(output, Mapping) else output
    return isinstance(output, (list, tuple, Mapping)) and any(map(_has_half, values))


@torch.no_grad()
def count_correct(output: Any, targets: Any) -> Tensor | None:
    """Count the correct predictions, []; None unless these are logits [B, K > 1] and integer labels [B]."""
    classifies = (
        isinstance(output, Tensor)
        and isinstance(targets, Tensor)
        and output.ndim == 2
        and output.shape[1] > 1
        and targets.ndim == 1
        and not targets.is_floating_point()
    )
    return (output.argmax(dim=1) == targets).sum() if classifies else None
