"""Sums over real examples, never means of means, kept on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_train.distributed.world import World


class Counts:
    """Sums of loss (nats), correct and seen examples, and of the user's metrics, kept where the work is.

    float64: exact enough to sum a whole split. MPS has none: there the sums live on the CPU.
    """

    def __init__(self, device: torch.device, names: tuple[str, ...] = ()) -> None:
        self.names = ("loss", "correct", "seen", *names)
        self.classifies = True  # until something was added that has no right and wrong
        self.sums = torch.zeros(len(self.names), dtype=torch.float64, device="cpu" if device.type == "mps" else device)

        self._loss, self._correct, self._seen = self.sums[:3]  # views, made once: a step costs microseconds

    @torch.no_grad()
    def add(self, loss: Tensor, correct: Tensor | None, seen: int, *own: float) -> None:
        """`loss` [] is the mean over the `seen` examples, `correct` [] a count, `own` metrics are means."""
        self.classifies = correct is not None
        self._loss.add_(loss.detach().to(self.sums.device), alpha=seen)
        if correct is not None:
            self._correct.add_(correct.to(self.sums.device))
        self._seen.add_(seen)
        for position, value in enumerate(own, start=3):
            self.sums[position] += value * seen

    def totals(self, world: World) -> dict[str, float]:
        """The sums over all ranks: one reduce, one wait for the device.

        Collective: every rank must call this.
        """
        sums = world.all_reduce(self.sums.clone())  # mps is always a world of one: no reduce there
        return dict(zip(self.names, sums.tolist(), strict=True))


class Overflows:
    """Updates that fp16 left out, as their gradients were not finite. Counted on the device, where the scale lives.

    The optimizer itself cannot tell: a fused one skips the update in its kernel.
    """

    def __init__(self, scaler: torch.amp.GradScaler, device: torch.device) -> None:
        self._scaler = scaler
        self._one = torch.ones((), device=device)
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)  # since `pop`, in a row, most in a row since

    def scale(self) -> Tensor:
        return self._scaler.scale(self._one)

    def record_update(self, scale_before: Tensor) -> None:
        """Only an overflow makes the scale smaller."""
        left_out = (self.scale() < scale_before).long()
        self.counts[0] += left_out
        self.counts[1] = (self.counts[1] + 1) * left_out
        self.counts[2] = torch.maximum(self.counts[2], self.counts[1])

    def pop(self) -> tuple[int, int]:
        """How many since the last call, and the most of them in a row. Waits for the device."""
        count, _, most = self.counts.tolist()
        self.counts[0] = self.counts[2] = 0
        return count, most
