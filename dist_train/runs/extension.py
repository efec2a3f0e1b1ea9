"""Training a run for longer than it was started for: the settings that may change with that, and what is recorded."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

_MAY_CHANGE = ("train_for", "optimizer.lr", "schedule", "early_stop")


def may_change(setting: str) -> bool:
    """Whether an extension may give this setting, by its dotted name, another value."""
    return any(setting == name or setting.startswith(f"{name}.") for name in _MAY_CHANGE)


def with_extension(provenance: Mapping[str, Any], step: int, changes: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Return the content of run.json with an extension at `step`. `changes`: old and new value by setting, as YAML."""
    settings = {key: [*both] for key, both in changes.items()}
    earlier = provenance.get("extensions", [])
    if earlier and earlier[-1]["settings"] == settings:  # a start that was killed before it changed them
        earlier = earlier[:-1]
    new = {"time": round(time.time(), 3), "step": step, "settings": settings}
    return {**provenance, "extensions": [*earlier, new]}


def describe(extension: Mapping[str, Any]) -> str:
    """ "at step 1410: train_for: 3 epochs -> 5 epochs"."""
    changes = (f"{setting}: {old} -> {new}" for setting, (old, new) in extension["settings"].items())
    return f"at step {extension['step']}: {', '.join(changes)}"
