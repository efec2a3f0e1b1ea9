"""Averaged weights: an exponential moving average of the trained net, in a copy of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dist_train.errors import UserCodeError


class AveragedNet(AveragedModel):
    """A copy of a net, `module`, with averaged weights. Its state has the keys of torch's AveragedModel.

    AveragedModel either averages or copies all buffers. This class averages running statistics, and copies the rest:
    an average of an index table, a mask, a counter or a spectral norm vector makes no sense.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        """
        Raises:
            UserCodeError: the net cannot be copied.
        """
        kind = type(net).__name__
        if found := next(_non_leaf_attributes(net), None):
            raise UserCodeError(
                f"ema_decay={decay}: {kind} cannot be copied: its {found} is computed from weights and stored, as by "
                f"the old torch.nn.utils.weight_norm. Use torch.nn.utils.parametrizations.weight_norm, or set "
                f"ema_decay=null."
            )
        try:
            super().__init__(net)
        except Exception as error:  # a user's net may hold anything
            raise UserCodeError(
                f"ema_decay={decay}: {kind} cannot be copied: {type(error).__name__}: {error}. Set ema_decay=null."
            ) from error
        self.requires_grad_(False)
        self.n_averaged = self.n_averaged.to(next(net.parameters()).device)  # counted by a captured update too
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self, model: nn.Module, *, is_first: bool) -> None:
        """Average in the weights of `model`, once after each update; after the first one of a run, copy them.

        AveragedModel's `update_parameters` reads `n_averaged` to know whether it is the first: it waits for the device,
        and cannot be captured.
        """
        averaged: list[Tensor] = []
        current: list[Tensor] = []
        for mine, theirs, has_average in _pairs(self.module, model):
            if not is_first and has_average and (mine.is_floating_point() or mine.is_complex()):
                averaged.append(mine)
                current.append(theirs)
            else:
                mine.copy_(theirs)
        if averaged:
            self._average(averaged, current, self.n_averaged)
        if is_first:
            self.n_averaged.fill_(1)
        else:
            self.n_averaged += 1


def _pairs(ours: nn.Module, theirs: nn.Module) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Yield each tensor of the copy, the same of the original, and whether it may be averaged."""
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        yield mine, other, True
    for one, other_module in zip(ours.modules(), theirs.modules(), strict=True):
        for name, buffer in one.named_buffers(recurse=False):
            yield buffer, other_module.get_buffer(name), isinstance(one, _BatchNorm)


def _non_leaf_attributes(net: nn.Module) -> Iterator[str]:
    """Yield the names of attributes that are computed (non-leaf) tensors, which torch cannot copy."""
    for path, module in net.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                yield f"{path}.{name}".lstrip(".")
