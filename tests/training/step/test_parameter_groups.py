"""Groups of parameters: who is in which, the learning rate of each, and that a checkpoint fits by name."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from dist_train.config.loading import parse_config
from dist_train.config.optimizer import OptimizerConfig
from dist_train.errors import ConfigError
from dist_train.training.step.optimizer_state import load_state
from dist_train.training.step.optimizers import build_optimizer
from dist_train.training.step.parameter_groups import describe_groups, parameter_groups, set_learning_rate

CPU = torch.device("cpu")


class Net(nn.Module):
    """A stem with a norm, two blocks in a list, of which one holds a list of its own, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 4))
        self.stem, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.body = nn.ModuleDict({"blocks": nn.Sequential(Block(), Block())})
        self.head = nn.Linear(4, 2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))


def found(**settings: Any) -> dict[str, tuple[float, float | None]]:
    """Return the factor and the weight decay of each parameter."""
    groups = parameter_groups(OptimizerConfig(name="adamw", **settings), Net())
    return {name: (each["lr_factor"], each.get("weight_decay")) for each in groups for name in each["param_names"]}


def test_one_group_unless_asked() -> None:
    (group,) = parameter_groups(OptimizerConfig(), Net())
    assert group["lr_factor"] == 1.0
    assert group["param_names"] == [name for name, _ in Net().named_parameters()]


def test_groups_by_pattern() -> None:
    """The first that matches takes a parameter; no_decay holds in each group."""
    groups: Any = [{"match": "*.inner.1.*", "weight_decay": 0.5}, {"match": "body.*", "lr_factor": 3}]
    assert {name: value for name, value in found(groups=groups, no_decay="1d").items() if value != (1.0, None)} == {
        "body.blocks.0.inner.1.weight": (1.0, 0.5), "body.blocks.1.inner.1.weight": (1.0, 0.5),
        "body.blocks.0.inner.0.weight": (3.0, None), "body.blocks.1.inner.0.weight": (3.0, None),
        "body.blocks.0.inner.0.bias": (3.0, 0.0), "body.blocks.1.inner.0.bias": (3.0, 0.0),
        "stem.bias": (1.0, 0.0), "norm.weight": (1.0, 0.0), "norm.bias": (1.0, 0.0), "head.bias": (1.0, 0.0),
    }  # fmt: skip


def test_layer_decay() -> None:
    """Four layers: the stem with its norm and the token, two blocks, the head, whose group multiplies it by 10."""
    head: Any = [{"match": "head", "lr_factor": 10}]
    factors = {name: factor for name, (factor, _) in found(layer_decay=0.5, groups=head).items()}
    expected = {
        "token": 1 / 8,
        "stem": 1 / 8,
        "norm": 1 / 8,
        "body.blocks.0": 1 / 4,
        "body.blocks.1": 1 / 2,
        "head": 10,
    }
    for name, factor in factors.items():
        assert factor == next(value for prefix, value in expected.items() if name.startswith(prefix))


@pytest.mark.parametrize(
    ("groups", "why"),
    [
        (
            ["haed"],
            r"optimizer\.groups\.0\.match=haed matches no parameter of Net\. Did you mean head\? Its par",
        ),
        (["*", "head.*"], r"optimizer\.groups\.1\.match=head\.\* matches only what groups before it take"),
    ],
)
def test_pattern_that_takes_nothing_is_refused(groups: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        found(groups=[{"match": pattern} for pattern in groups])


@pytest.mark.parametrize(
    ("group", "why"),
    [
        ({"lr_factor": 2}, r"optimizer\.groups\.0\.match=.*: field required"),
        ({"match": "*", "lr_factor": 0}, r"optimizer\.groups\.0\.lr_factor=0: input should be greater than 0"),
        (
            {"match": "*", "lr": 1},
            r"Unknown setting optimizer\.groups\.0\.lr\. Did you mean optimizer\.groups\.0\.lr_factor\?",
        ),
    ],
)
def test_invalid_group_is_refused(group: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_config({"optimizer": {"groups": [group]}})


def optimizer_of(net: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return build_optimizer(OptimizerConfig(**settings), net, CPU)


def test_learning_rate_of_each_group() -> None:
    """Also of groups whose rate a compiled step reads from the device, in the same tensors."""
    groups: Any = [{"match": "head.*", "lr_factor": 10}]
    found = optimizer_of(Net(), groups=groups).param_groups
    assert (
        describe_groups(found)
        == "lr x 1, weight decay 0: token and 10 more; lr x 10, weight decay 0: head.weight and 1 more"
    )
    set_learning_rate(found, 0.5)
    assert [group["lr"] for group in found] == [0.5, 5.0]
    tensors = [torch.tensor(group["lr"]) for group in found]
    for group, tensor in zip(found, tensors, strict=True):
        group["lr"] = tensor
    set_learning_rate(found, 0.25)
    assert [tensor.item() for tensor in tensors] == [0.25, 2.5]


def test_checkpoint_of_other_groups_is_refused() -> None:
    """torch goes by the order: the momenta of two layers of one shape would be exchanged in silence."""
    saved = optimizer_of(nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})).state_dict()
    other = optimizer_of(nn.ModuleDict({"b": nn.Linear(2, 2), "a": nn.Linear(2, 2)}))
    with pytest.raises(ValueError, match=r"b\.weight is number 0 in group 0 of the optimizer, and was not when saved"):
        load_state(other, deepcopy(saved))


def test_checkpoint_without_names_is_accepted() -> None:
    """As those of older versions: one group, without names or factors, and a tensor as the rate of a compiled step."""
    saved = optimizer_of(Net()).state_dict()
    (group,) = saved["param_groups"]
    del group["param_names"], group["lr_factor"]
    group["lr"] = torch.tensor(0.5)
    optimizer = optimizer_of(Net())
    load_state(optimizer, saved)
    set_learning_rate(optimizer.param_groups, 0.25)
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.param_groups[0]["param_names"][0] == "token"
