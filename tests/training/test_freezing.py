"""A part of the net is frozen, then trained: at the same step and to the same bits, whatever happens in between."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_train.config.loading import parse_config
from dist_train.distributed.world import World
from dist_train.errors import ConfigError
from dist_train.models.freezing import Frozen
from dist_train.runs.directory import RunDir
from dist_train.training.step.train_step import Step
from support.ranks import run_on_ranks, train_here, train_on_ranks
from support.run_files import assert_bit_identical, largest_difference, metrics, train_losses, weights
from support.tiny_runs import new_net, new_step, take
from support.user_nets import Normed

UNTIL = 3
SETTINGS: dict[str, Any] = {
    "data": {"name": "support.user_sets:Jittered"},
    "model": {"name": "support.user_nets:Normed", "freeze": ["first", "norm"]},
    "optimizer": {"name": "adamw", "lr": 1e-2, "weight_decay": 0.1},
    "max_grad_norm": 0.5,
    "global_batch_size": 12,
    "train_for": "6 steps",
    "log_every": 1,
    "eval_every": "1 steps",
    "save_every": "1 steps",
    "keep_last": 50,
    "final_train_eval": False,
}
MLP = SETTINGS | {
    "model": {"name": "mlp", "args": {"image_size": 8, "hidden": 16}, "freeze": ["fc1"],
              "freeze_until": f"{UNTIL} steps"},
}  # fmt: skip


def weights_at(run_dir: Path, step: int) -> dict[str, Any]:
    return load_file(str(run_dir / f"checkpoints/step_{step:08d}/model.safetensors"))


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {"ema_decay": 0.9, "per_device_batch_size": 6}),
        # Its gradients are long enough for gloo's ring: another layout of the buckets adds in another order.
        (3, {"model": {"name": "bks", "freeze": ["conv*", "fc1.weight"], "freeze_until": f"{UNTIL} steps"},
             "data": {"name": "support.user_sets:mnist_part"}, "global_batch_size": 96, "eval_every": 0}),
    ],
    ids=["averaged", "three-ranks"],
)  # fmt: skip
def test_resume_before_at_and_after_the_step_equals_never_stopped(
    world_size: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    settings = MLP | changes
    train_on_ranks(settings, tmp_path / "whole", world_size)
    for stop_after in (UNTIL - 1, UNTIL, UNTIL + 1):
        train_on_ranks(settings, tmp_path / "parts", world_size, stop_after=stop_after)
    train_on_ranks(settings, tmp_path / "parts", world_size)
    assert metrics(tmp_path / "parts")[-1]["attempt"] == 4
    assert_bit_identical(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize(
    "optimizer",
    [SETTINGS["optimizer"], {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}],
    ids=["adamw", "sgd"],
)
def test_every_division_freezes_and_trains_the_same(optimizer: dict[str, Any], tmp_path: Path) -> None:
    """Until the step no weight decay moves a frozen weight; from it on all are trained."""
    settings = MLP | {"dtype": "float64", "optimizer": optimizer}
    train_on_ranks(settings, tmp_path / "whole")
    for world_size, per_device in ((1, 4), (2, 6), (3, 2)):
        part = tmp_path / f"{world_size}_{per_device}"
        train_on_ranks(settings | {"per_device_batch_size": per_device}, part, world_size)
        assert largest_difference(weights(part), weights(tmp_path / "whole")) < 1e-10
        assert train_losses(part) == pytest.approx(train_losses(tmp_path / "whole"), rel=1e-10)
        first, frozen, trained = (weights_at(part, step) for step in (1, UNTIL, UNTIL + 1))
        for name in first:
            assert torch.equal(first[name], frozen[name]) == name.startswith("fc1")
            assert not torch.equal(trained[name], frozen[name])


def test_frozen_batchnorm_keeps_its_statistics(tmp_path: Path) -> None:
    """After each evaluation and after a resume; the result then no longer depends on the division."""
    settings = SETTINGS | {"dtype": "float64"}
    train_on_ranks(settings, tmp_path / "1")
    train_on_ranks(settings, tmp_path / "3", world_size=3, stop_after=2)
    train_on_ranks(settings, tmp_path / "3", world_size=3)
    assert train_losses(tmp_path / "3") == pytest.approx(train_losses(tmp_path / "1"), rel=1e-10)
    for run_dir in (tmp_path / "1", tmp_path / "3"):
        first, last = weights_at(run_dir, 1), weights_at(run_dir, 6)
        assert {name for name in first if torch.equal(first[name], last[name])} == {
            "first.weight", "first.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var",
            "norm.num_batches_tracked",
        }  # fmt: skip
        assert last["norm.num_batches_tracked"] == 0


def test_unfrozen_batchnorm_takes_statistics_again(tmp_path: Path) -> None:
    settings = SETTINGS | {"model": SETTINGS["model"] | {"freeze_until": f"{UNTIL} steps"}}
    train_on_ranks(settings, tmp_path / "whole", world_size=2)
    train_on_ranks(settings, tmp_path / "parts", world_size=2, stop_after=4)
    train_on_ranks(settings, tmp_path / "parts", world_size=2)
    assert_bit_identical(tmp_path / "parts", tmp_path / "whole")
    counted = [int(weights_at(tmp_path / "whole", step)["norm.num_batches_tracked"]) for step in (UNTIL, 4, 6)]
    assert counted == [0, 1, 3]
    said = [line for line in (tmp_path / "whole/logs/rank_00000.log").read_text().splitlines() if "BatchNorm" in line]
    assert ["frozen: " in said[0], "depends on the number of processes" in said[-1], len(said)] == [True, True, 2]


def train_and_look(run_dir: Path) -> None:
    take, patches = Step.take, []

    def look_and_take(self: Step, step: int) -> None:
        forward: Any = self.net.forward
        patches.append(0)
        while forward := getattr(forward, "__wrapped__", None):
            patches[-1] += 1
        take(self, step)

    Step.take = look_and_take  # type: ignore[method-assign]
    assert train_here(MLP | {"mixed_precision": "bf16"}, run_dir) == "FINISHED"
    assert patches == [patches[0]] * 6
    assert patches[0] > 0


def test_mixed_precision_is_set_up_once(tmp_path: Path) -> None:
    """Accelerate patches `forward` for it each time that it wraps the net."""
    run_on_ranks(train_and_look, tmp_path / "run", world_size=2)


def train_and_count(run_dir: Path) -> None:
    take, found = Step.take, []

    def count_and_take(self: Step, step: int) -> None:
        found.append(sum(isinstance(each, DistributedDataParallel) for each in gc.get_objects()))
        vars(self.eager.model)["circle"] = self.eager.model  # as torch makes one unless its compiler is loaded
        take(self, step)

    Step.take = count_and_take  # type: ignore[method-assign]
    gc.disable()  # else it may collect in time by chance
    assert train_here(MLP, run_dir) == "FINISHED"
    assert found == [1] * 6


def test_old_ddp_is_gone(tmp_path: Path) -> None:
    """Its hooks would exchange gradients too."""
    run_on_ranks(train_and_count, tmp_path / "run", world_size=2)


def test_unused_frozen_layer_is_named_at_the_start(tmp_path: Path) -> None:
    """Not when it is unfrozen: two processes would wait for its gradient. Frozen for good it may stay."""
    model = {"name": "support.user_nets:Spare", "freeze": ["spare"]}
    train_on_ranks(SETTINGS | {"model": model}, tmp_path / "frozen", world_size=2)
    with pytest.raises(AssertionError, match="exit codes"):
        train_on_ranks(SETTINGS | {"model": model | {"freeze_until": "3 steps"}}, tmp_path / "later", world_size=2)
    message = RunDir(tmp_path / "later").read_error()["message"]
    assert "The loss gives no gradient to spare.weight and 1 more of Spare" in message
    assert not list((tmp_path / "later/checkpoints").glob("step_*"))


# --- what is frozen --------------------------------------------------------------------------------------------------


def trained_names(net: nn.Module) -> set[str]:
    return {name for name, each in net.named_parameters() if each.requires_grad}


@pytest.mark.parametrize(
    ("patterns", "trained"),
    [
        (["0"], {"1.0.weight", "1.0.bias", "1.1.weight", "1.1.bias", "2.weight", "2.bias"}),
        (["[01]"], {"2.weight", "2.bias"}),
        (["1.*"], {"0.weight", "0.bias", "2.weight", "2.bias"}),
        (["*.bias", "0.*"], {"1.0.weight", "1.1.weight", "2.weight"}),
    ],
)
def test_patterns_match_parameters_and_modules(patterns: list[str], trained: set[str]) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)), nn.Linear(5, 3))
    frozen = Frozen(net, patterns)
    assert trained_names(net) == trained
    assert net[1][1].training == ("1.1.weight" in trained)  # type: ignore[index]
    frozen.release()
    assert len(trained_names(net)) == 8
    assert net[1][1].training  # type: ignore[index]


def test_what_the_net_froze_itself_stays_frozen() -> None:
    net = new_net()
    net[0].requires_grad_(False)  # type: ignore[index]
    net[1].eval()  # type: ignore[index]
    Frozen(net, ["[01]"]).release()
    assert trained_names(net) == {"1.weight", "1.bias", "3.weight", "3.bias"}
    assert not net[1].training  # type: ignore[index]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["fist.*"], "model.freeze: fist.* matches no parameter or layer of Normed. Did you mean first"),
        (["encoder"], "Its parts: first, norm, second."),
        (["*"], r"model.freeze=\[\*\] freezes all 6 parameters of Normed: nothing is left to train."),
    ],
)
def test_mistakes_are_one_line(patterns: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Frozen(Normed(), patterns)


def test_end_without_freezing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model: freeze_until=2 epochs needs freeze, such as"):
        parse_config({"model": {"freeze_until": "2 epochs"}})


# --- one process -----------------------------------------------------------------------------------------------------


def frozen_step(world: World, **settings: Any) -> Step:
    config = parse_config({"device": "cpu", "optimizer": {"name": "adamw", "weight_decay": 0.1}, **settings})
    step = new_step(world, 0, config)
    step.frozen = Frozen(step.net, ["0"], UNTIL)
    return step


def test_average_and_gradient_norm_leave_frozen_weights_alone(world: World) -> None:
    step = frozen_step(world, ema_decay=0.9, max_grad_norm=1e-3)
    before = step.net.state_dict()["0.weight"].clone()
    step.warm_up(0)
    take(step, 0, UNTIL)
    for state in (step.net.state_dict(), step.evaluated_net.state_dict()):
        assert torch.equal(state["0.weight"], before)
    squares = [each.grad.square().sum() for each in step.net.parameters() if each.grad is not None]
    assert len(squares) == 4
    assert float(torch.stack(squares).sum().sqrt()) == pytest.approx(1e-3, rel=1e-3)


def test_log_names_no_frozen_batchnorm(world: World) -> None:
    step = new_step(world, 0)
    Frozen(step.net, ["1"])
    step.warm_up(0)
    assert step.effects.world_size_dependent == ["dropout (drawn per rank and micro-batch)"]
