"""Averaged weights: an exponential moving average of what is trained, kept beside it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dist_train.errors import UserCodeError


class AveragedNet(AveragedModel):
    """A copy of a net, `module`, that follows it. Its state has the keys of torch's AveragedModel.

    That one averages all buffers or copies all. A running statistic has an average; an index table, a mask, a counter
    or a vector of spectral norm has none.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        """
        Raises:
            UserCodeError: the net cannot be copied.
        """
        kind = type(net).__name__
        if found := next(_computed(net), None):
            raise UserCodeError(
                f"ema_decay={decay}: {kind} cannot be copied, since its {found} is computed from weights and kept, as "
                f"the older torch.nn.utils.weight_norm does. Use torch.nn.utils.parametrizations.weight_norm, or set "
                f"ema_decay=null."
            )
        try:
            super().__init__(net)
        except Exception as error:  # whatever a net of the user may hold
            raise UserCodeError(
                f"ema_decay={decay}: {kind} cannot be copied: {type(error).__name__}: {error}. Set ema_decay=null."
            ) from error
        self.requires_grad_(False)
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Once after each update of `model`, of which the first is copied."""
        average = bool(self.n_averaged > 0)
        averaged: list[Tensor] = []
        follow: list[Tensor] = []
        for mine, theirs, has_average in _pairs(self.module, model):
            if average and has_average and (mine.is_floating_point() or mine.is_complex()):
                averaged.append(mine)
                follow.append(theirs)
            else:
                mine.copy_(theirs)
        if averaged:
            self._average(averaged, follow, self.n_averaged)
        self.n_averaged += 1


def _pairs(ours: nn.Module, theirs: nn.Module) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Each tensor of a copy beside that of the original, and whether it may be averaged."""
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        yield mine, other, True
    for one, other_module in zip(ours.modules(), theirs.modules(), strict=True):
        for name, buffer in one.named_buffers(recurse=False):
            yield buffer, other_module.get_buffer(name), isinstance(one, _BatchNorm)


def _computed(net: nn.Module) -> Iterator[str]:
    """Tensors that are neither parameters nor buffers and hang on an operation; torch copies none of these."""
    for path, module in net.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                yield f"{path}.{name}".lstrip(".")
