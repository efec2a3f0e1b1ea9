"""Exact, resumable data-parallel training. Importing the package imports nothing else."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_train.config.loading import load_config
    from dist_train.config.schema import Config
    from dist_train.launch.python_api import Result, train

__version__ = "0.1.0"
__all__ = ["Config", "Result", "load_config", "train"]

_HOME = {
    "Config": "config.schema",
    "Result": "launch.python_api",
    "load_config": "config.loading",
    "train": "launch.python_api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
