"""State dicts with module versions, which torch needs to load what an older version of a module wrote."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

_VERSIONS_KEY = "versions"  # key in the file's header. Its value is JSON: the path of each module and its version


def header_of(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the safetensors header to write with these weights."""
    return {_VERSIONS_KEY: json.dumps({path: entry["version"] for path, entry in _versions(weights).items()})}


def read_weights(path: Path) -> OrderedDict[str, Tensor]:
    """Read the state dict in a safetensors file.

    Raises:
        OSError, SafetensorError: the file cannot be read.
    """
    weights = OrderedDict(load_file(str(path)))
    with safe_open(str(path), "pt") as file:
        header = file.metadata() or {}
    if _VERSIONS_KEY in header:  # older checkpoints lack it
        _set_metadata(
            weights, {path: {"version": version} for path, version in json.loads(header[_VERSIONS_KEY]).items()}
        )
    return weights


def with_versions_of(copied: dict[str, Any], weights: Mapping[str, Any]) -> dict[str, Any]:
    """Add the module versions of `weights`, which a plain dict loses, to a copy of its values."""
    if not hasattr(weights, "_metadata"):
        return copied
    return _set_metadata(OrderedDict(copied), _versions(weights))


def load_into(net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights into a net. Weights without versions are taken to have the versions of the net.

    Raises:
        Exception: whatever the net's modules raise if the weights do not fit.
    """
    if not hasattr(weights, "_metadata"):
        weights = _set_metadata(OrderedDict(weights), _versions(net.state_dict()))
    net.load_state_dict(weights)


def _versions(weights: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Return the integer versions only. User hooks may add other objects, and loading a checkpoint runs no code."""
    metadata = getattr(weights, "_metadata", {}).items()
    return {path: {"version": entry["version"]} for path, entry in metadata if isinstance(entry.get("version"), int)}


def _set_metadata(weights: OrderedDict[str, Any], versions: dict[str, dict[str, int]]) -> OrderedDict[str, Any]:
    weights._metadata = versions  # type: ignore[attr-defined]  # torch stores versions there
    return weights
