"""How one optimizer step is divided over ranks and micro-steps. Pure arithmetic, known before any process starts."""

from __future__ import annotations

from dataclasses import dataclass

from dist_train.errors import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """global_batch_size = per_device_batch_size x grad_accum_steps x world_size, without remainder."""

    per_device_batch_size: int  # examples per forward
    grad_accum_steps: int  # forwards per rank and step
    world_size: int

    @property
    def per_rank_batch_size(self) -> int:
        """Examples per rank and step."""
        return self.per_device_batch_size * self.grad_accum_steps

    @property
    def global_batch_size(self) -> int:
        return self.per_rank_batch_size * self.world_size

    def with_smaller_forwards(self) -> BatchPlan | None:
        """The same global batch in more micro-steps; None if an example at a time is too much already."""
        smaller = [d for d in _divisors(self.per_rank_batch_size) if d < self.per_device_batch_size]
        return BatchPlan(smaller[-1], self.per_rank_batch_size // smaller[-1], self.world_size) if smaller else None

    @classmethod
    def fit(cls, global_batch_size: int, at_most_per_device: int, world_size: int) -> BatchPlan:
        """The plan with the largest forwards that `at_most_per_device` allows.

        Raises:
            ConfigError: the global batch cannot be shared out equally; names the world sizes that fit.
        """
        per_rank_batch_size, rest = divmod(global_batch_size, world_size)
        if rest or not per_rank_batch_size:
            raise ConfigError(
                f"global_batch_size={global_batch_size} is not a multiple of world_size={world_size} "
                f"({world_size} x {per_rank_batch_size} = {world_size * per_rank_batch_size}). World sizes that fit: "
                f"{', '.join(map(str, _divisors_near(global_batch_size, world_size)))}."
            )
        per_device = max(d for d in _divisors(per_rank_batch_size) if d <= at_most_per_device)
        return cls(per_device, per_rank_batch_size // per_device, world_size)

    def check_epoch(self, num_examples: int) -> int:
        """Steps per epoch; the ragged tail that does not fill a global batch is dropped.

        Raises:
            ConfigError: the training set does not fill one global batch.
        """
        if num_examples < self.global_batch_size:
            raise ConfigError(
                f"global_batch_size={self.global_batch_size} is more than the {num_examples} training examples. "
                f"Set global_batch_size to at most {num_examples}."
            )
        return num_examples // self.global_batch_size


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _divisors_near(number: int, target: int, how_many: int = 6) -> list[int]:
    return sorted(sorted(_divisors(number), key=lambda d: (abs(d - target), d))[:how_many])
