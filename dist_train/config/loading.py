"""Loading a Config from a YAML file and `-o key=value` overrides, and writing it back. Each error is one line."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dist_train.config.mistakes import explain, short
from dist_train.config.schema import Config
from dist_train.errors import ConfigError, did_you_mean

_DEEPEST = 64


class _Numbers(yaml.resolver.Resolver):
    """Number syntax unlike YAML 1.1: 1e-3 is a number (there only 1.0e-3), 12:30:00 is not (there it is 45000)."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        if kind is yaml.ScalarNode and implicit[0]:
            if tag == "tag:yaml.org,2002:str" and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
                return "tag:yaml.org,2002:float"
            if tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and ":" in value:
                return "tag:yaml.org,2002:str"
        return tag


class _Loader(_Numbers, yaml.SafeLoader):
    """SafeLoader that also rejects duplicate keys, deep nesting and integers of more than 4300 digits."""

    def fetch_flow_collection_start(self, token: Any) -> None:
        """Reject deep nesting, which takes PyYAML seconds before it gives up."""
        if self.flow_level >= _DEEPEST:
            problem = f"brackets are nested more than {_DEEPEST} deep"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.get_mark())
        super().fetch_flow_collection_start(token)

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Reject a duplicate key: SafeLoader would drop one of its two values."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {key.value}", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return node

    def construct_yaml_int(self, node: Any) -> Any:
        """Reject an integer of more than 4300 digits: Python reads it as 0x... but cannot print it."""
        try:
            value = super().construct_yaml_int(node)
            str(value)
        except ValueError as error:
            problem = str(error).partition("; use sys.")[0]
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from None
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


class _Dumper(_Numbers, yaml.SafeDumper):
    """Dumper that quotes text which _Loader would read as a number."""


def _read_yaml(text: str) -> Any:
    """Parse YAML and raise only yaml.YAMLError: PyYAML does not catch the errors of int(), date() and so on."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise
    except Exception as error:
        raise yaml.YAMLError(f"{error}") from error


def to_yaml(config: Config) -> str:
    """Return all settings as YAML, including defaults. It loads as the same config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return both values, as YAML, of each flat setting that differs: "not set" where its section is not set."""
    keys = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
    return {key: (_value_text(mine, key), _value_text(theirs, key)) for key in keys}


def overrides_between(base: Config, config: Config) -> list[str]:
    """Return the overrides that turn `base` into `config`, `runs_dir` excepted."""
    before, missing = base.flat(), object()
    settings = config.flat()
    settings.pop("runs_dir")
    return [f"{key}={value_text(value)}" for key, value in settings.items() if before.get(key, missing) != value]


def _value_text(settings: Mapping[str, Any], key: str) -> str:
    return value_text(settings[key]) if key in settings else "not set"


def value_text(value: Any) -> str:
    """Return a value as YAML on one line, as it is written after `key=`."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=math.inf, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")  # the end of a document that is a single value


def bundled_configs() -> dict[str, Path]:
    """Return the bundled configs by name, without sweep.yaml, which is a W&B sweep and not a training."""
    package = Path(__file__).resolve().parents[1]
    folder = next((f for f in (package / "configs", package.parent / "configs") if f.is_dir()), None)
    configs = {path.stem: path for path in sorted(folder.glob("*.yaml"))} if folder else {}
    configs.pop("sweep", None)
    return configs


def find_config(name: str) -> Path:
    """Return the file `name`, else the bundled config: `mnist`, or `configs/mnist.yaml` from any folder."""
    path = Path(name)
    try:
        if path.is_file():
            return path
    except OSError as error:
        raise ConfigError(f"No config file {short(name)}: {error.strerror}.") from None
    bundled = bundled_configs()
    if path.stem in bundled and name in (path.stem, f"configs/{path.stem}.yaml"):
        return bundled[path.stem]
    raise ConfigError(
        f"No config file {name}.{did_you_mean(path.stem, bundled)} dist-train config ls lists the bundled ones."
    )


def missing_config(overrides: Sequence[str]) -> ConfigError:
    """Return the error of a command that was given overrides, but no config."""
    hint = next((f" {named}" for override in overrides if (named := _as_config(override))), "")
    return ConfigError(
        f"No config.{hint or ' Name one, for example -c mnist.'} dist-train config ls lists the bundled ones."
    )


def _as_config(override: str) -> str:
    """Return "Did you mean -c NAME?" if an override is, or is nearly, the name of a config, else ""."""
    if "=" in override:
        return ""
    try:
        find_config(override)
    except ConfigError:
        return did_you_mean(override, bundled_configs(), "-c ").strip()
    return f"Did you mean -c {override}?"


def load_config(name: str, overrides: tuple[str, ...] | list[str] = ()) -> Config:
    """Load a config. Overrides such as `optimizer.lr=3e-4` win over the YAML file, which wins over defaults.

    Raises:
        ConfigError: one line for each setting that is unknown, of the wrong type or out of range.
    """
    path = find_config(name)
    try:
        tree = _read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold settings (`key: value`), not a {type(tree).__name__}.")
    for override in overrides:
        _apply(tree, override)
    return parse_config(tree)


def parse_config(tree: dict[Any, Any]) -> Config:
    """Validate nested settings. Raises ConfigError, as `load_config`."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(item) for item in error.errors())) from None


def _apply(tree: dict[str, Any], override: str) -> None:
    key, value = parse_override(override)
    *sections, name = key.split(".")
    node = tree
    for section in sections:
        if not isinstance(node.get(section), dict):
            node[section] = {}
        node = node[section]
    node[name] = value


def parse_override(override: str) -> tuple[str, Any]:
    """Return the dotted name and the value of `key=value`.

    Raises:
        ConfigError: it does not have this form.
    """
    key, equals, text = override.partition("=")
    if not equals or not all(key.strip().split(".")):
        fix = _as_config(override) or "Write it as key=value, for example optimizer.lr=3e-4."
        raise ConfigError(f'"{override}" is not a setting. {fix}')
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):  # a few could stand for gigabytes
            raise ConfigError(f'"{override[:100]}" has an alias (*name). Write the value itself.')
        return key.strip(), _read_yaml(text) if text else None
    except yaml.YAMLError:
        raise ConfigError(f'The value of "{override}" is not YAML. Quote it, for example {key}=\'"text"\'.') from None


def listed(override: str) -> list[str]:
    """Split `key=[a, b]` into `key=a` and `key=b`. Returns [] if the value is not a list, or is an empty one."""
    key, _, text = override.partition("=")
    try:
        node = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError:
        return []  # _apply reports the error
    items = node.value if isinstance(node, yaml.SequenceNode) else []
    return [f"{key}={text[item.start_mark.index : item.end_mark.index]}" for item in items]
