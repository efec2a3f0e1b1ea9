"""Conversion of settings to YAML trees and back."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from dist_train.config.loading import load_config, parse_config, to_yaml
from dist_train.config.schema import Config

DEFAULT = parse_config({})


def load(text: str, *overrides: str, folder: Path) -> Config:
    path = folder / "config.yaml"
    path.write_text(text)
    return load_config(str(path), overrides)


def read_back(config: Config) -> Config:
    with tempfile.TemporaryDirectory() as folder:
        return load(to_yaml(config), folder=Path(folder))


def put(tree: dict[Any, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            return
    tree[last] = value
