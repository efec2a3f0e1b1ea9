"""One line for a wrong setting: the setting as it was typed, what is allowed, and what was probably meant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel

from dist_train.config.schema import Config, section_of
from dist_train.errors import did_you_mean, nearest

# What other programs call a setting, and its values.
_SETTINGS = {
    "learning_rate": "lr", "batch_size": "global_batch_size", "precision": "mixed_precision", "amp": "mixed_precision",
    "bf16": "mixed_precision", "fp16": "mixed_precision", "criterion": "loss", "loss_fn": "loss", "monitor": "best_by",
    "num_classes": "model.args.num_classes",
}  # fmt: skip
_DURATIONS = {
    "epochs": "epochs", "num_epochs": "epochs", "max_epochs": "epochs", "num_train_epochs": "epochs",
    "steps": "steps", "max_steps": "steps", "num_steps": "steps", "iterations": "steps",
}  # fmt: skip
_VALUES = {
    "gpu": ("cuda",), "bfloat16": ("bf16",), "float16": ("fp16",), "half": ("fp16",), "float32": ("no",),
    "fp32": ("no",), "32": ("no",), "false": ("no", "disabled"), "none": ("no", "disabled"), "true": ("auto", "bf16"),
    "bcewithlogitsloss": ("bce",), "crossentropyloss": ("cross_entropy",), "mseloss": ("mse",),
}  # fmt: skip
_OPTIONS = {"gpus": "nproc", "devices": "nproc", "num_processes": "nproc", "nproc_per_node": "nproc"}


def explain(item: Any) -> str:
    """Return the line for one of pydantic's errors."""
    location = [str(part) for part in item["loc"]]
    key, value = ".".join(location), item["input"]
    if item["type"] == "extra_forbidden":
        return _unknown(location)
    if item["type"] == "model_type":
        return _not_a_section(key, value, location)
    reason = str(item["msg"]).removeprefix("Value error, ").rstrip(".")
    if item["type"] == "value_error" and isinstance(value, dict):
        return f"{key or 'The config'}: {reason}."
    return f"{key}={short(value)}: {reason[:1].lower()}{reason[1:]}.{_value_meant(item)}"


def option_meant(option: str) -> str:
    """Return how a setting that was given as an option, `--lr`, is written; "" if there is no such setting."""
    name = option.lstrip("-").replace("-", "_")
    if name in _OPTIONS:
        return f" Did you mean --{_OPTIONS[name]}?"
    meant = _setting_meant([name])
    value = "" if "=" in meant else "=VALUE"
    return f" Did you mean -o {meant}{value}?" if meant else ""


def _unknown(location: list[str]) -> str:
    key, meant = ".".join(location), _setting_meant(location)
    section, prefix = _section_at(location[:-1]), ".".join(location[:-1])
    if meant:
        hint = f" Did you mean {meant}?"
    else:
        hint = f" Settings of {prefix}: {', '.join(section.model_fields)}." if section and prefix else ""
    return f"Unknown setting {key}.{hint} dist-train config reference explains all."


def _section_at(location: Sequence[str]) -> type[BaseModel] | None:
    """Return the section class at a place such as ["optimizer", "groups", "0"], an entry of a list of sections."""
    annotation: Any = Config
    for part in location:
        section = section_of(annotation)
        annotation = section.model_fields[part].annotation if section else get_args(annotation)[0]
    return section_of(annotation)


def _setting_meant(location: list[str]) -> str:
    """Return the setting that is most similar to this unknown one, a duration with its unit; "" if none is."""
    section, prefix = _section_at(location[:-1]), "".join(f"{part}." for part in location[:-1])
    names = list(section.model_fields) if section else []
    name = _SETTINGS.get(location[-1], location[-1])
    if name in names:
        return prefix + name
    if "." in name and not prefix:
        return name
    if not prefix:
        if name in _DURATIONS:
            return f'train_for="N {_DURATIONS[name]}"'
        sections = {key: section_of(field.annotation) for key, field in Config.model_fields.items()}
        found = [key for key, section in sections.items() if section and name in section.model_fields]
        if len(found) == 1:
            return f"{found[0]}.{name}"
    sharing_a_word = (each for each in names if each in name.split("_") or name in each.split("_"))
    near = nearest(name, names) or next(sharing_a_word, "")
    return prefix + near if near else ""


def _not_a_section(key: str, value: Any, location: list[str]) -> str:
    section = _section_at(location)
    names = list(section.model_fields) if section else []
    if isinstance(value, str) and "name" in names:
        return f"{key}={short(value)}: {key} is a section. Did you mean {key}.name={short(value)}?"
    shown = ", ".join(f"{key}.{name}" for name in names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{key}={short(value)}: {key} is a section. Its settings: {shown}."


def _value_meant(item: Any) -> str:
    if item["type"] != "literal_error":
        return ""
    allowed = str(item["ctx"]["expected"]).split("'")[1::2]
    value = str(item["input"]).lower()
    same = next((text for text in _VALUES.get(value, ()) if text in allowed), None)
    return f" Did you mean {same}?" if same else did_you_mean(value, allowed)


def short(value: object) -> str:
    try:
        text = str(value)
    except RecursionError:
        text = "..."
    return text if len(text) <= 80 else text[:77] + "..."
