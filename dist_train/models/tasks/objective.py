"""Loss and metrics: the net's own methods `loss` and `metrics`, else the loss of the task and accuracy."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.data.loader import loader_error
from dist_train.data.mixing import Mixed
from dist_train.data.sets.image_set import Examples, describe_example
from dist_train.data.transforms import change_each
from dist_train.distributed.devices import is_device_assert, is_out_of_memory
from dist_train.distributed.peer_failures import is_peer_failure
from dist_train.errors import ConfigError, UserCodeError
from dist_train.models.tasks.losses import CrossEntropy, Loss, TargetMismatch
from dist_train.user_code.importing import wrap_user_errors


class ErrorContext(AbstractContextManager[None]):
    """Turns errors of a net or of the loss on the examples at `indices` [B] into one line.

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

    def __init__(self, net: nn.Module, loss: Loss | None = None) -> None:
        """`loss`: that of the task, which the net's own takes the place of. None: cross-entropy."""
        self._name = type(net).__name__
        self._own_loss = getattr(net, "loss", None)
        self._own_metrics = getattr(net, "metrics", None)
        self._loss: Loss = loss or CrossEntropy()
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
        """Return the mean over the micro-batch of weight x loss, [] (nats for cross-entropy).

        The loss is the sum of these means over a whole batch, divided by that of `mean_weight`.
        """
        if isinstance(targets, Mixed):
            return self._loss_of_mixed(output, targets)
        if self._own_loss is None:
            try:
                return self._loss(output, targets)
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
                self.check(output, targets)
                raise
        loss = self._own_loss(output, targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UserCodeError(f"loss(output, target) must return one number, the mean over the batch; got {got}.")
        return loss.reshape(())

    def _loss_of_mixed(self, output: Any, targets: Mixed) -> Tensor:
        """Return the loss with the mixed labels: it is linear in them, smoothed and weighted or not."""
        loss = targets.share * self.loss(output, targets.labels)
        try:
            return loss + (1 - targets.share) * self.loss(output, targets.others)
        except TargetMismatch as error:
            raise TargetMismatch(str(error)) from error  # its row is another example's

    def mean_weight(self, targets: Any) -> Tensor | None:
        """Return the mean weight of the examples of the micro-batch in the loss, []; None if all weights are 1."""
        if self._own_loss is not None:
            return None
        if not isinstance(targets, Mixed):
            return self._loss.mean_weight(targets)
        of_labels, of_others = self._loss.mean_weight(targets.labels), self._loss.mean_weight(targets.others)
        if of_labels is None or of_others is None:
            return None
        return targets.share * of_labels + (1 - targets.share) * of_others

    def check(self, output: Any, targets: Any) -> None:
        """Check that the task's loss accepts output and targets, unless the net has its own. Waits for the device.

        Raises:
            ConfigError: the images are mixed, and the net has its own loss.
            TargetMismatch: it does not accept them.
        """
        if isinstance(targets, Mixed):
            if self._own_loss is not None:
                raise ConfigError(
                    f"data.augment.mixup_alpha and cutmix_alpha give an image two labels, and {self._name}.loss takes "
                    f"one. Remove both settings, or {self._name}.loss to train with cross-entropy."
                )
            self.check(output, targets.labels)
            return
        if self._own_loss is None:
            self._loss.check(self._name, output, targets)

    def doubt(self, output: Any) -> str:
        """Return a warning if the task's loss, which takes logits, seems to be given probabilities; else ""."""
        ours = self._own_loss is None and isinstance(output, Tensor)
        return self._loss.doubt(self._name, output) if ours else ""

    def check_labels(self, output: Any, labels: Tensor | None) -> None:
        """Check that the task's loss accepts the values of the labels. Waits for the device of the labels.

        Raises:
            TargetMismatch: a label is out of range.
        """
        if labels is not None and self._own_loss is None and isinstance(output, Tensor):
            self._loss.check_labels(self._name, output, labels)

    def correct(self, output: Any, targets: Any) -> Tensor | None:
        """Count the correct predictions, []; None if the net does not classify all examples: see `count_correct`."""
        return None if self._own_loss is None and self._loss.ignores else count_correct(output, targets)

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
    """Count the correct predictions, []; None unless these are logits [B, K > 1] and integer labels [B].

    Of mixed labels the one with the larger share counts.
    """
    if isinstance(targets, Mixed):
        targets = targets.larger
    classifies = (
        isinstance(output, Tensor)
        and isinstance(targets, Tensor)
        and output.ndim == 2
        and output.shape[1] > 1
        and targets.ndim == 1
        and not targets.is_floating_point()
    )
    return (output.argmax(dim=1) == targets).sum() if classifies else None
