"""A run is the same for any division of its batches, and resumed as if never stopped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from support.ranks import train_on_ranks
from support.run_files import assert_bit_identical, largest_difference, train_losses, weights


def check_every_division(
    settings: dict[str, Any], folder: Path, steps: int, stop: int, divided: Sequence[tuple[int, int | None]]
) -> Path:
    """Train float64 runs of `steps` steps in `folder` and return the directory of one that was never stopped.

    One on one process that stops after `stop` steps and is resumed equals it to the bit. One in micro-batches, on the
    processes and up to the step of each entry of `divided`, is within 1e-10.
    """
    for run, parts, per_device in (
        ("whole", [(1, None)], 96),
        ("parts", [(1, stop), (1, None)], 96),
        ("divided", divided, 12),
    ):
        for world_size, stop_after in parts:
            train_on_ranks(settings | {"per_device_batch_size": per_device}, folder / run, world_size, stop_after)
    whole = folder / "whole"
    assert_bit_identical(folder / "parts", whole)
    assert len(train_losses(folder / "divided")) == steps
    assert train_losses(folder / "divided") == pytest.approx(train_losses(whole), rel=1e-10)
    assert largest_difference(weights(folder / "divided"), weights(whole)) < 1e-10
    return whole
