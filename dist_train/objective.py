"""What is minimised and what is measured: the net's own `loss` and `metrics`, else cross-entropy and accuracy."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from torch.nn import functional

from dist_train.errors import ConfigError, UserCodeError

_IGNORE_NOTHING = -(2**31)  # torch's own default, -100, would pass over such labels in silence


class Objective:
    """The forward call, the loss and the metrics of one net.

    `net` is the module as the user wrote it; the module that is called may be wrapped (DDP) or averaged (EMA).
    """

    def __init__(self, net: nn.Module, label_smoothing: float = 0.0) -> None:
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
        return convert_to_fp32(output) if _has_half(output) else output

    def loss(self, output: Any, targets: Any) -> Tensor:
        """The mean loss over the micro-batch, [] (nats for cross-entropy)."""
        if self._own_loss is None:
            # Labels that are ignored would make the mean one over fewer examples, and micro-batches unequal parts.
            return functional.cross_entropy(
                output, targets, label_smoothing=self._label_smoothing, ignore_index=_IGNORE_NOTHING
            )
        loss = self._own_loss(output, targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UserCodeError(f"loss(output, target) must return one number, the mean over the batch; got {found}.")
        return loss.reshape(())

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


def _has_half(output: Any) -> bool:
    if isinstance(output, Tensor):
        return output.dtype in (torch.bfloat16, torch.float16)
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
