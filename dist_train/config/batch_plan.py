"""The division of one global batch over ranks and micro-steps, computed before any process starts."""

from __future__ import annotations

from dataclasses import dataclass

from dist_train.config.schema import Config
from dist_train.errors import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """The division of one optimizer step: global batch = per device x grad_accum_steps x world_size, no remainder."""

    per_device_batch_size: int  # examples per forward pass
    grad_accum_steps: int  # forward passes (micro-steps) per rank and optimizer step
    world_size: int

    @property
    def per_rank_batch_size(self) -> int:
        """Examples per rank and optimizer step."""
        return self.per_device_batch_size * self.grad_accum_steps

    @property
    def global_batch_size(self) -> int:
        return self.per_rank_batch_size * self.world_size

    def describe(self) -> str:
        """ "global batch 64 = 32 per device x 1 micro-step x 2 processes"."""
        factors = (
            f"{self.per_device_batch_size} per device",
            _counted(self.grad_accum_steps, "micro-step"),
            _counted(self.world_size, "process"),
        )
        return f"global batch {self.global_batch_size} = {' x '.join(factors)}"

    def with_smaller_forwards(self) -> BatchPlan | None:
        """Return a plan for the same global batch with more micro-steps, or None if a forward has only one example."""
        smaller = [d for d in _divisors(self.per_rank_batch_size) if d < self.per_device_batch_size]
        return BatchPlan(smaller[-1], self.per_rank_batch_size // smaller[-1], self.world_size) if smaller else None

    @classmethod
    def of(cls, config: Config, world_size: int) -> BatchPlan:
        """Return the plan of a config: see `fit`. With `per_device_batch_size: auto` any micro-batch may be chosen."""
        at_most = config.per_device_batch_size
        return cls.fit(config.global_batch_size, config.global_batch_size if at_most == "auto" else at_most, world_size)

    @classmethod
    def fit(cls, global_batch_size: int, at_most_per_device: int, world_size: int) -> BatchPlan:
        """Return the plan with the largest micro-batch that is at most `at_most_per_device`.

        Raises:
            ConfigError: the global batch is not divisible by `world_size`; the message names world sizes that fit.
        """
        per_rank_batch_size, remainder = divmod(global_batch_size, world_size)
        if remainder or not per_rank_batch_size:
            raise ConfigError(
                f"global_batch_size={global_batch_size} is not a multiple of world_size={world_size} "
                f"({world_size} x {per_rank_batch_size} = {world_size * per_rank_batch_size}). World sizes that fit: "
                f"{', '.join(map(str, _divisors_near(global_batch_size, world_size)))}."
            )
        per_device = max(d for d in _divisors(per_rank_batch_size) if d <= at_most_per_device)
        return cls(per_device, per_rank_batch_size // per_device, world_size)

    def check_epoch(self, num_examples: int) -> int:
        """Return the steps per epoch. The last, incomplete global batch of an epoch is dropped.

        Raises:
            ConfigError: the training set is smaller than one global batch.
        """
        if num_examples < self.global_batch_size:
            raise ConfigError(
                f"global_batch_size={self.global_batch_size} is more than the {num_examples} training examples. "
                f"Set global_batch_size to at most {num_examples}."
            )
        return num_examples // self.global_batch_size


def _counted(number: int, noun: str) -> str:
    plural = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{plural}"


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _divisors_near(number: int, target: int, how_many: int = 6) -> list[int]:
    return sorted(sorted(_divisors(number), key=lambda d: (abs(d - target), d))[:how_many])
