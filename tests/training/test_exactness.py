"""Promises 1 to 3: exact counts, the same step for any division of the batch, stop + resume = never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.ranks import train_on_ranks
from support.run_files import assert_bit_identical, largest_difference, metrics, train_losses, weights
from support.trainings import DIVISIONS, MNIST, NETS

# The same on the first 960 images, for slow tests.
PART = MNIST | {"data": MNIST["data"] | {"name": "support.user_sets:mnist_part"}}


@pytest.mark.parametrize("net", NETS)
def test_float64_runs_agree_for_every_division(net: str, tmp_path: Path) -> None:
    """All steps and images for one net, fewer for the others. `make exactness` does 400 steps for all nets, on all
    images."""
    small = net == "mlp"
    settings = (MNIST if small else PART) | {
        "dtype": "float64", "model": NETS[net], "train_for": f"{400 if small else 4} steps", "log_every": 2,
        "eval_every": 0,
    }  # fmt: skip
    train_on_ranks(settings, tmp_path / "whole")
    for world_size, per_device in DIVISIONS[2:] if net == "conv" else DIVISIONS:
        part = tmp_path / f"{world_size}_{per_device}"
        train_on_ranks(settings | {"per_device_batch_size": per_device}, part, world_size)
        assert largest_difference(weights(part), weights(tmp_path / "whole")) < 1e-10
        assert train_losses(part) == pytest.approx(train_losses(tmp_path / "whole"), rel=1e-10)
        last, whole_last = metrics(part)[-1], metrics(tmp_path / "whole")[-1]
        assert last["val/seen"] == (10_000 if small else 960)
        assert last["val/accuracy"] == whole_last["val/accuracy"]  # the same number of correct test images


@pytest.mark.parametrize("net", ["mlp", "guide", "bks", "fast"])
def test_first_losses_in_fp32_agree(net: str, tmp_path: Path) -> None:
    """Without conv: its loss leaves a plateau by amplifying any difference, rounding too. Adam at lr 1e-3 takes that
    from 1e-7 to 2e-3 within 20 steps (SGD: 2e-7). In float64, above, conv agrees like the others."""
    settings = PART | {"model": NETS[net], "train_for": "20 steps", "log_every": 1, "eval_every": 0}
    for world_size in (1, 2, 3):
        train_on_ranks(settings, tmp_path / str(world_size), world_size)
    for world_size in (2, 3):
        losses = train_losses(tmp_path / str(world_size))
        assert len(losses) == 20
        assert losses == pytest.approx(train_losses(tmp_path / "1"), rel=1e-5)


SMALL: dict[str, Any] = {
    "data": {"name": "support.user_sets:Jittered"},
    "model": {"name": "support.user_sets:WithDropout"},
    "global_batch_size": 12,
    "train_for": "5 epochs",  # of 8 steps: the last incomplete batch of 101 examples is dropped
    "eval_every": "10 steps",
    "log_every": 3,
    "save_every": "7 steps",
    "keep_last": 50,
    "optimizer": {"lr": 1e-2},
    "schedule": {"name": "cosine", "warmup": "4 steps"},
    "max_grad_norm": 1.0,
}


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 2), (2, 0), (3, 2), (4, 0)])
def test_resumed_run_equals_uninterrupted_run(world_size: int, num_workers: int, tmp_path: Path) -> None:
    """Dropout and a streamed set with random transforms; stopped twice, mid-epoch and when an evaluation is due."""
    settings = SMALL | {"data": {"name": "support.user_sets:Jittered", "num_workers": num_workers}}
    train_on_ranks(SMALL, tmp_path / "whole", world_size)
    for stop_after in (11, 20):
        train_on_ranks(settings, tmp_path / "parts", world_size, stop_after=stop_after)
    train_on_ranks(settings, tmp_path / "parts", world_size)
    assert metrics(tmp_path / "parts")[-1]["attempt"] == 3
    assert_bit_identical(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("world_size", [3, 4])
def test_resume_keeps_gradient_buckets(world_size: int, tmp_path: Path) -> None:
    """A net large enough for gloo's ring: without the warm-up it sums in another order after a resume."""
    settings = PART | {"model": {"name": "bks"}, "train_for": "8 steps", "log_every": 1}
    train_on_ranks(settings, tmp_path / "whole", world_size)
    train_on_ranks(settings, tmp_path / "parts", world_size, stop_after=3)
    train_on_ranks(settings, tmp_path / "parts", world_size)
    assert_bit_identical(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("extra", [{"ema_decay": 0.9}, {"per_device_batch_size": 2}], ids=["ema", "micro-steps"])
def test_resume_of_averages_and_micro_steps(extra: dict[str, Any], tmp_path: Path) -> None:
    train_on_ranks(SMALL | extra, tmp_path / "whole", world_size=3)
    train_on_ranks(SMALL | extra, tmp_path / "parts", world_size=3, stop_after=13)
    train_on_ranks(SMALL | extra, tmp_path / "parts", world_size=3)
    assert_bit_identical(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3)])
def test_resume_on_another_world_size(before: int, after: int, tmp_path: Path) -> None:
    """Within 1e-6 over the 20 steps after the resume: streamed and resident, random transforms, no dropout."""
    for name, settings in {
        "streamed": SMALL | {"model": {"name": "support.user_sets:WithDropout"}, "log_every": 1},
        "resident": PART | {"model": NETS["guide"], "train_for": "24 steps", "log_every": 1, "eval_every": 0},
    }.items():
        if name == "streamed":
            settings = settings | {"model": {"name": "mlp", "args": {"image_size": 8, "hidden": 16}}}
        train_on_ranks(settings, tmp_path / name / "whole", before)
        train_on_ranks(settings, tmp_path / name / "parts", before, stop_after=4)
        train_on_ranks(settings, tmp_path / name / "parts", after)
        ours, theirs = train_losses(tmp_path / name / "parts"), train_losses(tmp_path / name / "whole")
        assert len(ours) == len(theirs)
        assert ours[4:24] == pytest.approx(theirs[4:24], abs=1e-6, rel=1e-6)


def test_evaluation_counts_every_example_once(tmp_path: Path) -> None:
    """101 examples on 2 ranks are 101, as the real MNIST's 10 000 on 3 (above) are 10 000."""
    train_on_ranks(SMALL, tmp_path / "run", world_size=2)
    assert {line["val/seen"] for line in metrics(tmp_path / "run") if "val/seen" in line} == {101}
