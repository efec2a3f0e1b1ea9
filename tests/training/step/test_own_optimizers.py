"""Optimizers that are not built in: a user's class, torch.optim's, timm's, and Muon."""

from __future__ import annotations

import re
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.optim import Optimizer

from dist_train.cli import main
from dist_train.config.loading import parse_config
from dist_train.config.optimizer import OptimizerConfig
from dist_train.errors import ConfigError
from dist_train.runs.directory import RunDir
from dist_train.training.step.muon import hidden_matrices
from dist_train.training.step.optimizer_state import load_state, saved_state
from dist_train.training.step.optimizers import build_optimizer
from dist_train.training.step.parameter_groups import describe_groups, set_learning_rate
from support.run_files import assert_equal

CPU = torch.device("cpu")
MINE = "support.user_optimizers"


def optimizer_of(net: nn.Module, name: str, **settings: Any) -> Optimizer:
    return build_optimizer(OptimizerConfig(name=name, **settings), net, CPU)


def train(net: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        net.zero_grad()
        net(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()


def new_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3))


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        (f"{MINE}:Closure", {}, "fails on a gradient, without a closure: .*user_optimizers.py:"),
        ("torch.optim:LBFGS", {}, r"its step\(\) needs closure, and a step here has one gradient"),
        (f"{MINE}:TwoModes", {}, r"has train\(\) and eval\(\): .* ema_decay=0\.999"),
        (f"{MINE}:Forgetful", {}, r"its steps after a resume differ, since state_dict\(\) does not hold all"),
        (f"{MINE}:Deaf", {}, r"takes the same steps for any lr in its param_groups"),
        (f"{MINE}:Hoarder", {}, "its state holds seen of type set, which a checkpoint cannot"),
        (f"{MINE}:Rateless", {}, r"takes no lr, which the schedule sets\. It takes: params, speed"),
        (f"{MINE}:halved", {}, r"is not a class that derives from torch\.optim\.Optimizer"),
        (f"{MINE}:Anchord", {}, r"has no Anchord\. .* Did you mean Anchored\?"),
        (f"{MINE}:Anchored", {"args": {"nois": 1}}, r"optimizer\.args\.nois\. Did you mean optimizer\.args\.noise\?"),
        (f"{MINE}:Anchored", {"args": {"noise": "loud"}}, "fails on a gradient, .*: TypeError"),
        (f"{MINE}:Undecayed", {"weight_decay": 0.1}, r"optimizer\.weight_decay=0\.1: .*ed takes no weight_decay"),
        (f"{MINE}:Undecayed", {"no_decay": "1d"}, r"optimizer\.no_decay=1d: .*Undecayed takes no weight_decay"),
        (f"{MINE}:Undecayed", {"groups": [{"match": "*", "weight_decay": 0}]}, r"optimizer\.groups\.0\.weight_decay=0"),
        ("torch.optim:Adagrad", {"lr": -1}, r"optimizer\.lr=-1: input should be greater than 0"),
        ("torch.optim:Adagrad", {"args": {"eps": -1}}, "cannot be constructed: .*: ValueError: Invalid epsilon"),
        ("timm:larss", {}, r"optimizer\.name=timm:larss: no such optimizer\. Did you mean timm:lars\?"),
        ("timm:lamb", {"args": {"beta": [0, 0]}}, r"optimizer\.args\.beta\. Did you mean optimizer\.args\.betas\?"),
        ("timm:adahessian", {}, "fails on a gradient, without a closure"),
        ("muon", {"args": {"adjust_lr_fn": "none"}}, "optimizer.name=muon cannot be constructed: .*: ValueError: Adj"),
        ("muon", {"args": {"ns_step": 3}}, r"optimizer\.args\.ns_step\. Did you mean optimizer\.args\.ns_steps\?"),
    ],
)  # fmt: skip
def test_what_cannot_train_is_refused_before_processes_start(name: str, settings: dict[str, Any], why: str) -> None:
    overrides = [f"optimizer.{key}={value}" for key, value in settings.items()]
    arguments = ["config", "validate", "-c", "smoke", f"optimizer.name={name}", *overrides]
    done = CliRunner().invoke(main, arguments, prog_name="dist-train")
    assert done.exit_code in (1, 2), done.output
    assert len(done.stderr.splitlines()) == 1
    assert re.search(why, done.stderr), done.stderr


def test_start_of_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before there is a folder."""
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "-c", "smoke", "optimizer.name=torch.optim:LBFGS", "--nproc", "2"]
    done = CliRunner().invoke(main, arguments, prog_name="dist-train")
    assert (done.exit_code, done.stdout, [*tmp_path.iterdir()]) == (1, "", [])
    assert "step() needs closure" in done.stderr


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"name": "adam", "args": {"a": 1}}, "optimizer: adam has no args. Its settings: lr, amsgrad, "),
        ({"name": "timm:lamb", "betas": [0, 0]}, "timm:lamb has no betas. Its settings: lr, args, weight_decay. Did "),
        ({"name": "timm:lamb", "args": {"lr": 1}}, "optimizer: args.lr=1: set optimizer.lr instead."),
        ({"name": "Muon"}, "optimizer.name=Muon: no such optimizer. Did you mean muon?"),
    ],
)  # fmt: skip
def test_settings_that_belong_elsewhere_are_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError) as found:
        parse_config({"optimizer": settings})
    assert why in str(found.value)


@pytest.mark.parametrize("mode", ["compile", "graph"])
def test_faster_form_of_a_step_of_its_own_is_refused(mode: str) -> None:
    with pytest.raises(ConfigError, match=rf"step_mode={mode}: optimizer\.name=timm:lamb takes its own step"):
        parse_config({"step_mode": mode, "optimizer": {"name": "timm:lamb"}})


def test_missing_timm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    with pytest.raises(ConfigError, match=r"optimizer\.name=timm:lamb needs timm: pip install 'dist-train\[timm\]'\."):
        optimizer_of(new_net(), "timm:lamb")


@pytest.mark.parametrize(
    ("name", "reference"),
    [("torch.optim:NAdam", torch.optim.NAdam), ("torch.optim:Adagrad", torch.optim.Adagrad)],
)
def test_own_step_is_that_of_the_class(name: str, reference: Any) -> None:
    """With the learning rate, the weight decay and the arguments that were set."""
    ours, theirs = new_net(), new_net()
    train(ours, optimizer_of(ours, name, lr=0.01, weight_decay=0.1, args={"eps": 0.1}), range(4))
    train(theirs, reference(theirs.parameters(), lr=0.01, weight_decay=0.1, eps=0.1), range(4))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("name", ["timm:lamb", "timm:lars", "timm:muon", f"{MINE}:Anchored", "muon"])
def test_groups_hold_for_a_step_of_its_own(name: str) -> None:
    """The rate of a group is the schedule's times its factor: 0 moves nothing else."""
    net = new_net()
    optimizer = optimizer_of(net, name, groups=[{"match": "1", "lr_factor": 3}], weight_decay=0.1, no_decay="1d")
    set_learning_rate(optimizer.param_groups, 0.5)
    rates = {each: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups
             for each in group["param_names"]}  # fmt: skip
    assert rates == {f"{layer}.{each}": (1.5 if layer == 1 else 0.5, 0.1 if each == "weight" else 0.0)
                     for layer in range(3) for each in ("weight", "bias")}  # fmt: skip
    before = deepcopy(net.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if group["lr_factor"] == 1 else 0.5
    train(net, optimizer, range(1))
    moved = {each for each, value in net.state_dict().items() if not torch.equal(value, before[each])}
    assert moved == {"1.weight", "1.bias"}


@pytest.mark.parametrize("name", [f"{MINE}:Anchored", "timm:lamb", "timm:muon", "timm:lookahead_adam", "muon"])
def test_state_is_saved_and_loaded_to_the_bit(name: str) -> None:
    """Also where it holds integers, lists and text, and what the optimizer changes in its groups."""
    net, other = new_net(), new_net(seed=1)
    optimizer, resumed = optimizer_of(net, name), optimizer_of(other, name)
    train(net, optimizer, range(5))
    saved = deepcopy(saved_state(optimizer, name))
    load_state(resumed, deepcopy(saved))
    assert_equal(saved_state(resumed, name), saved)
    other.load_state_dict(net.state_dict())
    for trained, by in ((net, optimizer), (other, resumed)):
        train(trained, by, range(5, 12))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.write_config(parse_config({"optimizer": {"name": "timm:lamb"}}))
    (run_dir.checkpoints / "step_00000001").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"optimizer\.name: timm:lamb in the run, timm:lars now"):
        run_dir.check_config(parse_config({"optimizer": {"name": "timm:lars"}}))


class Transformer(nn.Module):
    """Two embeddings, a block with matrices, a convolution and a norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 4))
        self.words, self.places = nn.Embedding(9, 4), nn.Embedding(9, 4)
        self.block = nn.ModuleDict({"up": nn.Linear(4, 8), "norm": nn.LayerNorm(8), "mix": nn.Conv1d(8, 4, 3)})
        self.head = nn.Linear(4, 9)


def test_muon_trains_the_matrices_of_hidden_layers() -> None:
    """And AdamW all else, each as torch does alone; one rate suits both."""
    assert hidden_matrices(Transformer()) == {"block.up.weight"}
    ours, theirs = new_net(), new_net()
    optimizer = optimizer_of(ours, "muon", lr=0.01, weight_decay=0.1)
    assert describe_groups(optimizer.param_groups) == (
        "Muon lr x 1, weight decay 0.1: 1.weight; AdamW lr x 1, weight decay 0.1: 0.weight and 4 more"
    )
    train(ours, optimizer, range(4))
    rest = [each for name, each in theirs.named_parameters() if name != "1.weight"]
    arguments: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
    matrix = torch.optim.Muon([theirs[1].weight], adjust_lr_fn="match_rms_adamw", **arguments)  # type: ignore[index]
    both = [matrix, torch.optim.AdamW(rest, **arguments)]
    for step in range(4):
        torch.manual_seed(step)
        theirs.zero_grad()
        theirs(torch.randn(8, 6)).square().mean().backward()
        for each in both:
            each.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize(
    "net", [nn.Linear(2, 2), nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.Linear(2, 2))]
)
def test_muon_without_a_matrix_is_refused(net: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"has no matrix in a hidden layer, .* optimizer\.name=adamw, or timm:muon"):
        optimizer_of(net, "muon")
