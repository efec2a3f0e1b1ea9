"""Groups of parameters: the learning rate and the weight decay of each parameter of a net."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from dist_train.config.optimizer import OptimizerConfig
from dist_train.errors import ConfigError, did_you_mean
from dist_train.models.name_patterns import covers
from dist_train.training.step.forward_effects import first_of

_LISTS = (nn.Sequential, nn.ModuleList)
_MOST_SHOWN = 4  # groups in the log


def parameter_groups(config: OptimizerConfig, net: nn.Module) -> list[dict[str, Any]]:
    """Return the groups for torch's optimizers: params, param_names, lr_factor, and weight_decay where it differs.

    They are one group, with the factor 1, if no setting asks for more.

    Raises:
        ConfigError: a pattern matches no parameter, or only such that an earlier group takes.
    """
    taken = _matches(config, net)
    depths = _depths(net) if config.layer_decay is not None else {}
    groups: dict[tuple[float, float | None], dict[str, Any]] = {}
    for name, parameter in net.named_parameters():
        own = config.groups[taken[name]] if name in taken else None
        factor = (own.lr_factor if own else 1.0) * (config.layer_decay or 1.0) ** depths.get(name, 0)
        decay = 0.0 if config.no_decay == "1d" and parameter.dim() < 2 else own.weight_decay if own else None
        group = groups.setdefault((factor, decay), {"params": [], "param_names": [], "lr_factor": factor})
        if decay is not None:
            group["weight_decay"] = decay
        group["params"].append(parameter)
        group["param_names"].append(name)
    return list(groups.values())


def set_learning_rate(groups: list[dict[str, Any]], lr: float) -> None:
    """Set the lr of each group; in place where a compiled or captured step reads it from the device."""
    for group in groups:
        own = lr * group["lr_factor"]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(own)
        else:
            group["lr"] = own


def check_same_groups(groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    """Check that saved groups, of which old ones have no names, hold the same parameters in the same order.

    Raises:
        ValueError: naming the first that differs. torch goes by the order alone.
    """
    now, then = _places(groups), _places(saved)
    for name, place in now.items():
        if then and then.get(name) != place:
            raise ValueError(
                f"{name} is number {place[1]} in group {place[0]} of the optimizer, and was not when saved"
            )


def describe_groups(groups: list[dict[str, Any]]) -> str:
    """Return one line: "lr x 10, weight decay 0: head.weight and 1 more; lr x 1, weight decay 0.05: ..."."""
    factors = [group["lr_factor"] for group in groups]
    if len(groups) > _MOST_SHOWN:
        return f"{len(groups)} groups of parameters, lr x {min(factors):.4g} to {max(factors):.4g}"
    return "; ".join(
        f"{group.get('optimizer', '')} lr x {group['lr_factor']:.4g}, weight decay {group.get('weight_decay', 0):g}: "
        f"{first_of(group['param_names'])}".lstrip()
        for group in groups
    )


def _places(groups: list[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """Return group and number, both from 0, of each parameter."""
    return {
        name: (index, number)
        for index, group in enumerate(groups)
        for number, name in enumerate(group.get("param_names", ()))
    }


def _matches(config: OptimizerConfig, net: nn.Module) -> dict[str, int]:
    """Return the index in `optimizer.groups` of each parameter that one of them matches."""
    names = [name for name, _ in net.named_parameters()]
    taken: dict[str, int] = {}
    for index, group in enumerate(config.groups):
        where = f"optimizer.groups.{index}.match={group.match}"
        matched = [name for name in names if covers(group.match, name)]
        if not matched:
            modules = [path for path, _ in net.named_modules()]
            raise ConfigError(
                f"{where} matches no parameter of {type(net).__name__}.{did_you_mean(group.match, [*names, *modules])} "
                f"Its parameters: {', '.join(names[:8])}{', ...' if names[8:] else ''}."
            )
        free = [name for name in matched if name not in taken]
        if not free:
            raise ConfigError(f"{where} matches only what groups before it take. Put it before them, or remove it.")
        taken |= dict.fromkeys(free, index)
    return taken


def _depths(net: nn.Module) -> dict[str, int]:
    """Return how many layers lie between each parameter and the last layer. One outside all is in the first."""
    layers: dict[str, int] = {}
    last = -1
    for path, block in _blocks(net, "", in_list=type(net) in _LISTS):
        parameters = dict(block.named_parameters())
        if any(parameter.dim() > 1 for parameter in parameters.values()) or (parameters and last < 0):
            last += 1
        layers |= dict.fromkeys((f"{path}{name}" for name in parameters), last)
    return {name: max(0, last) - layers.get(name, 0) for name, _ in net.named_parameters()}


def _blocks(module: nn.Module, path: str, in_list: bool) -> Iterator[tuple[str, nn.Module]]:
    """Yield the path, with its dot, and the module of each block. Lists are opened, and what holds a list of blocks."""
    for name, child in module.named_children():
        inner, is_list = f"{path}{name}.", type(child) in _LISTS
        if is_list or (not in_list and any(type(each) in _LISTS for each in child.modules())):
            yield from _blocks(child, inner, is_list)
        else:
            yield inner, child
