"""`dist-train lr-find`: the same curve on any number of processes, and nothing left but the picture."""

from __future__ import annotations

import json
import math
import random
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from torch.optim import Optimizer

from dist_train.cli import main
from dist_train.config.loading import parse_config
from dist_train.models.nets import Mlp
from dist_train.tools.lr_find.curve import Curve
from dist_train.tools.lr_find.range_test import RangeTest
from dist_train.tools.lr_find.rank import run as run_rank
from dist_train.training.step.eager import EagerUpdate
from support.ranks import join_group, run_on_ranks

SETTINGS: dict[str, Any] = {
    "data": {"name": "support.user_sets:mnist_part"},
    "dtype": "float64",
    "global_batch_size": 24,
    "optimizer": {"name": "sgd", "momentum": 0.9, "groups": [{"match": "fc2", "lr_factor": 0.5}]},
}
RATES = [1e-4 * 10 ** (at / 20) for at in range(100)]


def find_on_rank(settings: dict[str, Any], out: Path) -> None:
    """Write the curve; check the rate of each parameter group at each step."""
    join_group("lr-find")
    take, factors = EagerUpdate.__call__, []

    def take_and_look(self: EagerUpdate, step: int) -> None:
        take(self, step)
        optimizer: Optimizer = self.optimizer
        factors.append(sorted(group["lr"] / self.learning_rate.at(step) for group in optimizer.param_groups))

    EagerUpdate.__call__ = take_and_look  # type: ignore[method-assign]
    curve = run_rank(RangeTest(1e-3, 1e3, 30), parse_config(settings))
    assert factors == [pytest.approx([0.5, 1.0])] * len(curve.rates)
    out.write_text(json.dumps(asdict(curve)))


def test_curve_does_not_depend_on_division(tmp_path: Path) -> None:
    """It begins with `model.weights`, here of logits 0, and ends where the loss diverges."""
    torch.manual_seed(0)
    weights = {name: value * (not name.startswith("fc2")) for name, value in Mlp().state_dict().items()}
    torch.save(weights, tmp_path / "weights.pth")
    settings = SETTINGS | {"model": {"name": "mlp", "weights": str(tmp_path / "weights.pth")}}
    curves = []
    for world_size, per_device in ((1, 24), (2, 6), (3, 8)):
        divided = settings | {"per_device_batch_size": per_device}
        run_on_ranks(find_on_rank, divided, tmp_path / "curve", world_size=world_size)
        curves.append(Curve(**json.loads((tmp_path / "curve").read_text())))
    first, *others = curves
    assert first.losses[0] == pytest.approx(math.log(10))
    assert first.has_diverged
    assert 10 < len(first.losses) < 30
    assert first.rates == pytest.approx([1e-3 * 10 ** (6 * at / 29) for at in range(len(first.rates))])
    assert first.steepest is not None
    for other in others:
        assert other.rates == first.rates
        assert other.losses == pytest.approx(first.losses, rel=1e-10)
        assert other.steepest == first.steepest


def call(*arguments: str) -> Result:
    """Call `lr-find` in this process; its ranks are processes of their own."""
    return CliRunner().invoke(main, ["lr-find", "-c", "smoke", "data.name=support.user_sets:mnist_part", *arguments])


def test_only_the_picture_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, temporary = tmp_path / "here", tmp_path / "temporary"
    folder.mkdir()
    temporary.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("TMPDIR", str(temporary))  # of the ranks
    done = call("--nproc=2", "global_batch_size=24", "--steps=40", "--out=rates.png")
    assert done.exit_code == 0, done.output
    assert "the loss falls fastest there" in done.output
    assert "written: rates.png" in done.output
    with Image.open("rates.png") as picture:
        assert picture.format == "PNG"
    assert [path.name for path in folder.iterdir()] == ["rates.png"]
    assert [*temporary.iterdir()] == []


def test_error_of_a_rank_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = call("global_batch_size=480")
    assert done.exit_code == 1
    assert done.output == (
        "error: An epoch has 2 steps of global_batch_size=480, and the test needs at least 10. Lower "
        "global_batch_size.\n"
    )
    assert [*tmp_path.iterdir()] == []


def bowl(at: int) -> float:
    """Falls fastest at point 40, is lowest at 60 and rises without bound."""
    return 1 - math.tanh((at - 40) / 6) + max(0, at - 60) ** 2 / 50


def test_suggestion_is_where_the_smoothed_loss_falls_fastest() -> None:
    noise = random.Random(0)
    losses = [bowl(at) + noise.gauss(0, 0.02) for at in range(100)]
    curve = Curve(RATES, losses, 100)
    assert curve.steepest in RATES[38:43]
    assert curve.lowest in RATES[55:62]
    assert curve.has_diverged
    assert not Curve(RATES[:60], losses[:60], 100).has_diverged
    spiked = [*losses[:70], 9.0, 0.1, *losses[72:]]  # a fall after the lowest is not meant
    assert Curve(RATES, spiked, 100).steepest == curve.steepest


@pytest.mark.parametrize("slope", [0.0, 0.02])
def test_loss_that_does_not_fall_suggests_nothing(slope: float) -> None:
    noise = random.Random(0)
    losses = [2.3 + slope * at + noise.gauss(0, 0.02) for at in range(100)]
    assert Curve(RATES, losses, 100).steepest is None
    assert Curve(RATES[:1], [math.nan], 100).steepest is None


def test_loss_that_is_no_number_has_diverged() -> None:
    for losses in ([math.nan], [1.0, math.inf], [1.0, 0.5, math.nan]):
        assert Curve(RATES[: len(losses)], losses, 100).has_diverged
    assert not Curve(RATES[:2], [-1.0, -0.9], 100).has_diverged
