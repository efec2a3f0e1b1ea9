"""What is minimised and what is measured: the net's own `loss` and `metrics`, else cross-entropy and accuracy."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_train.data.loader import loader_error
from dist_train.data.sets.image_set import Examples, form_of, name_of
from dist_train.data.transforms import change_each
from dist_train.distributed.devices import is_device_assert, is_out_of_memory
from dist_train.distributed.world import is_peer_failure
from dist_train.errors import ConfigError, UserCodeError
from dist_train.user_code.importing import wrap_user_errors

_IGNORE_NOTHING = -(2**31)  # torch's own default, -100, would pass over such labels in silence
_LABELS = (torch.int64, torch.uint8)  # that cross-entropy takes


class TargetMismatch(UserCodeError):
    """Output and targets that cross-entropy cannot be taken of."""

    def __init__(self, text: str, row: int | None = None) -> None:
        super().__init__(text)
        self.row = row  # of the micro-batch, if one is to blame


class ErrorContext(AbstractContextManager[None]):
    """What a net, its loss or cross-entropy raise over the examples at `indices` [B], in one line.

    No generator: it is entered at each micro-step, and takes 0.6 us where that takes 2.
    """

    def __init__(self, net: nn.Module, when: str, indices: Tensor, examples: Examples) -> None:
        self._net = net
        self._when = when
        self._indices = indices
        self._examples = examples

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, TargetMismatch) and error.row is not None:
            raise UserCodeError(f"{name_of(self._examples, int(self._indices[error.row]))} has {error}") from error
        if error is not None:
            with wrap_user_errors(type(self._net).__name__, f"failed {self._when}", unless=_is_not_the_nets):
                raise error


def _is_not_the_nets(error: BaseException) -> bool:
    faults = (is_peer_failure, is_out_of_memory, is_device_assert, loader_error)
    return any(is_fault(error) for is_fault in faults)


class Objective:
    """The forward call, the loss and the metrics of one net.

    `net` is the module as the user wrote it; the module that is called may be wrapped (DDP) or averaged (EMA).
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
        # A net with one required argument gets a list or tuple of inputs as it is, another gets them one by one.
        parameters = inspect.signature(type(net).forward).parameters.values()
        required = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
        self._unpack = len(required) > 2 or any(p.kind is p.VAR_POSITIONAL for p in required)

    @property
    def is_plain(self) -> bool:
        """Nothing of it is the net's own: over batches put together it is the mean of what it is over each."""
        return self._own_loss is None and self._own_metrics is None

    def forward(self, model: nn.Module, inputs: Any) -> Any:
        """The output for a micro-batch; logits [B, K] of a classifier. Never of half precision: whatever is counted
        from it would be rounded to two digits."""
        output = model(*inputs) if self._unpack and isinstance(inputs, (list, tuple)) else model(inputs)
        return change_each(_in_full, output) if _has_half(output) else output

    def loss(self, output: Any, targets: Any) -> Tensor:
        """The mean loss over the micro-batch, [] (nats for cross-entropy)."""
        if self._own_loss is None:
            # Labels that are ignored would make the mean one over fewer examples, and micro-batches unequal parts.
            try:
                return functional.cross_entropy(
                    output, targets, label_smoothing=self._label_smoothing, ignore_index=_IGNORE_NOTHING
                )
            except (IndexError, RuntimeError, TypeError, ValueError):
                self.check(output, targets)
                raise
        loss = self._own_loss(output, targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UserCodeError(f"loss(output, target) must return one number, the mean over the batch; got {found}.")
        return loss.reshape(())

    def check(self, output: Any, targets: Any) -> None:
        """See that cross-entropy, where the net has no loss of its own, can be taken of these. Waits for the device.

        Raises:
            TargetMismatch
        """
        if self._own_loss is not None:
            return
        fix = f"give {self._name} a method loss(output, target)"
        if not isinstance(output, Tensor) or output.ndim < 2 or output.shape[1] < 2:
            raise TargetMismatch(
                f"{self._name} gives {form_of(output)}, and cross-entropy takes logits [B, K > 1]. Return the logits "
                f"alone, or {fix}."
            )
        if isinstance(targets, Tensor) and targets.is_floating_point() and targets.shape == output.shape:
            return  # probabilities of the classes
        labels_of = [len(output), *output.shape[2:]]
        if not isinstance(targets, Tensor) or targets.dtype not in _LABELS or list(targets.shape) != labels_of:
            raise TargetMismatch(
                f"The targets are {form_of(targets)}, and cross-entropy over {form_of(output)} takes labels, int64 "
                f"{labels_of}. Make them whole numbers in the data set, or {fix}."
            )
        self.check_labels(output, targets)

    def check_labels(self, output: Any, labels: Tensor | None) -> None:
        """See that these (of any shape) are of classes that the net tells apart. Waits for the device they are on.

        Raises:
            TargetMismatch
        """
        if labels is None or self._own_loss is not None or not isinstance(output, Tensor):
            return
        if labels.dtype not in _LABELS or not labels.numel():
            return
        low, high = (int(end) for end in labels.aminmax())
        classes = output.shape[1]
        if low < 0 or high >= classes:
            place = ((labels < 0) | (labels >= classes)).nonzero()[0].tolist()
            raise TargetMismatch(
                f"label {int(labels[tuple(place)])}, which is none of the {classes} classes that {self._name} tells "
                f"apart: 0 to {classes - 1}. Number them from 0, or give the net more outputs.",
                row=place[0],
            )

    def metrics(self, output: Any, targets: Any) -> dict[str, float]:
        """The net's own metrics, means over the micro-batch. Evaluation only: they may wait for the device."""
        if self._own_metrics is None:
            return {}
        found = self._own_metrics(output, targets)
        if not isinstance(found, dict):
            raise UserCodeError(f"metrics(output, target) must return a dict of numbers; got {type(found).__name__}.")
        ours = found.keys() & {"loss", "correct", "seen"}
        if ours:
            raise UserCodeError(f"metrics(output, target) must not return {', '.join(sorted(ours))}: we count that.")
        return {str(name): float(value) for name, value in found.items()}


_HALF = (torch.bfloat16, torch.float16)


def _in_full(item: Any) -> Any:
    return item.float() if getattr(item, "dtype", None) in _HALF else item


def _has_half(output: Any) -> bool:
    if isinstance(output, Tensor):
        return output.dtype in _HALF
    values = output.values() if isinstance(output, Mapping) else output
    return isinstance(output, (list, tuple, Mapping)) and any(map(_has_half, values))


@torch.no_grad()
def count_correct(output: Any, targets: Any) -> Tensor | None:
    """How many of the micro-batch are right, []; None unless these are logits [B, K > 1] and integer labels [B]."""
    classifies = (
        isinstance(output, Tensor)
        and isinstance(targets, Tensor)
        and output.ndim == 2
        and output.shape[1] > 1
        and targets.ndim == 1
        and not targets.is_floating_point()
    )
    return (output.argmax(dim=1) == targets).sum() if classifies else None
