"""Sums over real examples, never means of means, kept on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_train.distributed.world import World


class Counts:
    """Sums of loss (nats), correct and seen examples, and of the user's metrics, kept on the device.

    float64 is exact enough to sum a whole split. MPS has no float64: there the sums are on the CPU.
    """

    def __init__(self, device: torch.device, names: tuple[str, ...] = ()) -> None:
        self.names = ("loss", "correct", "seen", *names)
        self.classifies = True  # until an output without right and wrong is added
        self.sums = torch.zeros(len(self.names), dtype=torch.float64, device="cpu" if device.type == "mps" else device)

        self._loss, self._correct, self._seen = self.sums[:3]  # views, made once: a step costs microseconds

    @torch.no_grad()
    def add(self, loss: Tensor, correct: Tensor | None, seen: int, *own: float) -> None:
        """Add a batch of `seen` examples: `loss` [] and the `own` metrics are means, `correct` [] is a count."""
        self.classifies = correct is not None
        self._loss.add_(loss.detach().to(self.sums.device), alpha=seen)
        if correct is not None:
            self._correct.add_(correct.to(self.sums.device))
        self._seen.add_(seen)
        for position, value in enumerate(own, start=3):
            self.sums[position] += value * seen

    def totals(self, world: World) -> dict[str, float]:
        """Return the sums over all ranks: one reduce, one wait for the device.

        Collective: every rank must call this.
        """
        sums = world.all_reduce(self.sums.clone())  # on MPS the world size is always 1: no reduce
        return dict(zip(self.names, sums.tolist(), strict=True))


class Overflows:
    """Counts the updates that fp16 skips because gradients are not finite. Counted on the device, where the scale is.

    The optimizer itself does not know: a fused one skips the update in its kernel.
    """

    def __init__(self, scaler: torch.amp.GradScaler, device: torch.device) -> None:
        self._scaler = scaler
        self._one = torch.ones((), device=device)
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)  # since `pop`, in a row, most in a row since

    def scale(self) -> Tensor:
        return self._scaler.scale(self._one)

    def record_update(self, scale_before: Tensor) -> None:
        """Count the update as skipped if the scale has shrunk, which only an overflow causes."""
        skipped = (self.scale() < scale_before).long()
        self.counts[0] += skipped
        self.counts[1] = (self.counts[1] + 1) * skipped
        self.counts[2] = torch.maximum(self.counts[2], self.counts[1])

    def pop(self) -> tuple[int, int]:
        """Return the number since the last call, and the most of them in a row. Waits for the device."""
        count, _, most = self.counts.tolist()
        self.counts[0] = self.counts[2] = 0
        return count, most
