"""`--simulate-world-size`: what the ranks would take, counted."""

from __future__ import annotations

import pytest

from dist_train.config.loading import load_config
from dist_train.data.sampler import ShardSampler
from dist_train.errors import DistTrainError
from dist_train.tools.simulate import simulate

PART = ["data.name=support.user_sets:mnist_part", "global_batch_size=96"]


def epoch_of(*settings: str, world_size: int = 3) -> str:
    return next(line for line in simulate(load_config("smoke", [*PART, *settings]), world_size) if "epoch" in line)


def test_each_example_is_taken_at_most_once() -> None:
    assert epoch_of() == "an epoch: 10 steps, 960 of 960 examples once, 0 dropped, 0 twice"


def test_draws_are_counted() -> None:
    """The same for any number of processes."""
    line = epoch_of("data.sampling=balanced")
    assert line.startswith("an epoch: 10 steps, ")
    assert "of 960 examples in 960 draws with replacement, " in line
    assert epoch_of("data.sampling=balanced", world_size=1) == line


@pytest.mark.parametrize("sampling", ["shuffled", "balanced"])
def test_wrong_shard_is_found(sampling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_rank_zero(sampler: ShardSampler, step: int) -> object:
        sampler.rank = 0
        return indices(sampler, step)

    indices = ShardSampler.indices
    monkeypatch.setattr(ShardSampler, "indices", of_rank_zero)
    with pytest.raises(DistTrainError, match="The ranks would not take the examples of the epoch's order"):
        [*simulate(load_config("smoke", [*PART, f"data.sampling={sampling}"]), 3)]
