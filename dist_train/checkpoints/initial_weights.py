"""The initial weights of a run, read from a file of the user's or from another run (`model.weights`)."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from dist_train.checkpoints.contents import MODEL
from dist_train.checkpoints.manifest import best_checkpoint, find_checkpoint
from dist_train.checkpoints.weights import load_into, read_weights
from dist_train.errors import ConfigError
from dist_train.models.published_weights import is_published, published_file
from dist_train.runs.directory import RunDir
from dist_train.runs.summary import find_run, is_run

_log = logging.getLogger(__name__)

_ENTRIES = ("state_dict", "model_state_dict", "model")  # where training programs keep a state dict in their files
_PREFIXES = ("module.", "_orig_mod.")  # of DDP and torch's AveragedModel; of torch.compile
_COUNTER = "n_averaged"  # of AveragedModel
_SHOWN = 3  # names in a message


def load_initial_weights(net: nn.Module, path: Path) -> dict[str, Any]:
    """Load a file into a net. Returns what run.json records: its path and SHA-256, and the tensors that were left out.

    `path` may also be that of a run, or its name: the file is then that of its best checkpoint, else of its last one;
    or a name of torchvision's, for a file in the cache of torch.hub.
    Left out is the last layer, if it has another shape, as for other classes; a warning names it. All else must fit.

    Raises:
        ConfigError: the file is not there, cannot be read, or does not fit.
        CheckpointError: the run has no good checkpoint.
    """
    file = _file_of(path.expanduser())
    weights = _read(file, f"model.weights={path}")
    own: dict[str, Tensor] = net.state_dict()
    _remove_wrappers(weights, own)
    misfits = _describe_misfits(weights, own)
    left_out = _last_layer_of_another_shape(net, weights, own)
    weights.update({name: own[name] for name in left_out})
    try:
        load_into(net, weights)
    except Exception as error:  # modules of the net may raise any exception
        raise ConfigError(
            f"model.weights={path} does not fit {type(net).__name__}: {misfits or ' '.join(str(error).split())}. Set "
            f"model.name and model.args to those of the net that was saved."
        ) from None
    if left_out:
        _log.warning("model.weights=%s: the last layer is left out, and starts from the seed: %s", path, misfits)
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return {"path": str(file), "sha256": digest, "left_out": left_out}


def _file_of(path: Path) -> Path:
    if is_published(path) and not path.is_file():
        return published_file(path)
    run = find_run(path)
    if path.is_file() or not is_run(run):
        return path.absolute()
    run_dir = RunDir(run.absolute())
    return find_checkpoint(run_dir, "best" if best_checkpoint(run_dir) else "last") / MODEL


def _read(file: Path, label: str) -> dict[str, Tensor]:
    """Return the state dict in a file. Code that the file may hold is not run."""
    fix = "Give a .safetensors file, or one that torch.save(net.state_dict(), FILE) wrote."
    try:
        if file.suffix == ".safetensors":
            return read_weights(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConfigError(f"{label} cannot be read: {error.strerror or error}. {fix}") from None
    except Exception as error:  # torch raises any exception for a damaged file
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"reading the {code[1]} in it would run code" if code else "it is damaged, or of another format"
        raise ConfigError(f"{label} cannot be read: {reason}. {fix}") from None
    if isinstance(found, dict):
        found = next((found[name] for name in _ENTRIES if isinstance(found.get(name), dict)), found)
    if isinstance(found, dict) and found and all(isinstance(value, Tensor) for value in found.values()):
        return found
    held = _some([str(name) for name in found]) if isinstance(found, dict) else f"a {type(found).__name__}"
    raise ConfigError(f"{label} holds {held or 'nothing'}, and no state dict. {fix}")


def _remove_wrappers(weights: dict[str, Tensor], own: Collection[str]) -> None:
    """Remove from the names what wrappers around the net have added, until names of the net appear."""
    weights.pop(_COUNTER, None)
    while not any(name in own for name in weights):
        prefix = next((each for each in _PREFIXES if all(name.startswith(each) for name in weights)), None)
        if prefix is None or not weights:
            return
        consume_prefix_in_state_dict_if_present(weights, prefix)


def _last_layer_of_another_shape(net: nn.Module, weights: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    """Return the tensors of the last layer if one of them, and no tensor elsewhere, has another shape, else []."""
    layer = next(reversed(dict(net.named_parameters())), "").rpartition(".")[0]
    reshaped = _reshaped(weights, own)
    if not layer or not reshaped or not all(name.startswith(f"{layer}.") for name in reshaped):
        return []
    return [name for name in own if name.startswith(f"{layer}.")]


def _reshaped(weights: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    return [name for name in own if name in weights and weights[name].shape != own[name].shape]


def _describe_misfits(weights: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    shapes = [
        f"{name} is {list(weights[name].shape)} in the file and {list(own[name].shape)} in the net"
        for name in _reshaped(weights, own)
    ]
    lacking = _some([name for name in own if name not in weights])
    unknown = _some([name for name in weights if name not in own])
    names = [f"the file lacks {lacking}" if lacking else "", f"the net has no {unknown}" if unknown else ""]
    return "; ".join(filter(None, [_some(shapes), *names]))


def _some(items: Collection[str]) -> str:
    shown = ", ".join([*items][:_SHOWN])
    return f"{shown} and {len(items) - _SHOWN} more" if len(items) > _SHOWN else shown
