"""State dicts with the versions of their modules, by which torch knows how to read what an older one wrote."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

_HEADING = "versions"  # in the header of the file: JSON, the path of each module and its version


def header_of(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """What safetensors is to write down beside these weights."""
    return {_HEADING: json.dumps({path: told["version"] for path, told in _versions(weights).items()})}


def read_weights(path: Path) -> OrderedDict[str, Tensor]:
    """The state dict in a file of safetensors.

    Raises:
        OSError, SafetensorError: it cannot be read.
    """
    weights = OrderedDict(load_file(str(path)))
    with safe_open(str(path), "pt") as file:
        header = file.metadata() or {}
    if _HEADING in header:  # not so in older checkpoints
        _keep(weights, {path: {"version": version} for path, version in json.loads(header[_HEADING]).items()})
    return weights


def with_versions_of(copied: dict[str, Any], weights: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a state dict's values, with the versions that a plain dict would lose."""
    if not hasattr(weights, "_metadata"):
        return copied
    return _keep(OrderedDict(copied), _versions(weights))


def load_into(net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Weights that do not know their versions are read as of the net's own.

    Raises:
        Exception: of whatever kind its modules raise where they do not fit.
    """
    if not hasattr(weights, "_metadata"):
        weights = _keep(OrderedDict(weights), _versions(net.state_dict()))
    net.load_state_dict(weights)


def _versions(weights: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Numbers alone: whatever else a hook of the user may have put there, a checkpoint is read without running code."""
    told = getattr(weights, "_metadata", {}).items()
    return {path: {"version": each["version"]} for path, each in told if isinstance(each.get("version"), int)}


def _keep(weights: OrderedDict[str, Any], versions: dict[str, dict[str, int]]) -> OrderedDict[str, Any]:
    weights._metadata = versions  # type: ignore[attr-defined]  # where torch itself keeps them
    return weights
