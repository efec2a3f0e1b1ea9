"""Runs that draw their examples with replacement: the same for any division, and resumed as if never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.divisions import check_every_division
from support.processes import DIST_TRAIN
from support.ranks import run_forked, train_on_ranks
from support.run_files import metrics
from support.trainings import MNIST

STEPS = 14  # into the second epoch of 10
RUN: dict[str, Any] = MNIST | {
    "dtype": "float64", "step_mode": "eager", "train_for": f"{STEPS} steps", "log_every": 1, "eval_every": 0,
}  # fmt: skip
DATA: dict[str, Any] = MNIST["data"] | {"name": "support.user_sets:mnist_part"}  # 960 examples


@pytest.fixture
def by_number(tmp_path: Path) -> Path:
    """A file of weights: the later an example, the likelier."""
    path = tmp_path / "weights.txt"
    path.write_text("\n".join(map(str, range(960))))
    return path


@pytest.mark.parametrize("sampling", ["balanced", "weighted"])
def test_run_is_equal_for_every_division_and_resume(sampling: str, by_number: Path, tmp_path: Path) -> None:
    """On one process stopped in mid-epoch, to the bit; on two in micro-batches and resumed on three, within 1e-10."""
    how = {"sampling": "balanced"} if sampling == "balanced" else {"sample_weights": str(by_number)}
    settings = RUN | {"data": DATA | how}
    whole = check_every_division(settings, tmp_path, STEPS, 7, [(2, 7), (3, 10), (1, None)])
    audits = [line for line in metrics(whole) if "audit/unique" in line]
    assert [line["audit/unique"] + line["audit/duplicate"] for line in audits] == [960, 4 * 96]
    assert all(line["audit/duplicate"] > 0 for line in audits)


def test_weights_belong_to_the_run(by_number: Path, tmp_path: Path) -> None:
    """A resume needs the same ones; an evaluation needs none."""
    run_dir, settings = tmp_path / "run", RUN | {"data": DATA | {"sample_weights": str(by_number)}}
    train_on_ranks(settings, run_dir, stop_after=4)
    by_number.write_text("1 " * 960)
    with pytest.raises(
        AssertionError, match=r"The train set has sample weights with checksum .*, but the run began with"
    ):
        train_on_ranks(settings, run_dir)
    by_number.unlink()
    assert run_forked([*DIST_TRAIN, "evaluate", str(run_dir)], tmp_path).returncode == 0
