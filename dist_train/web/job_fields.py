"""The fields of the form of a new job, and the settings that they stand for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_train.config.loading import bundled_configs, load_config, overrides_between, value_text
from dist_train.config.optimizer import OPTIMIZERS
from dist_train.config.schema import Config
from dist_train.data.sets.catalog import SETS
from dist_train.errors import LibraryError
from dist_train.models.names import NETS
from dist_train.user_code import library
from dist_train.user_code.library import Kind, Version

Texts = Mapping[str, str]  # by field


@dataclass(frozen=True)
class Setting:
    """A field for one setting, of the same name."""

    name: str
    label: str
    hint: str = ""
    unit: str = ""  # of a number without one
    if_empty: str = ""  # what an empty field means
    choices: tuple[str, ...] = ()
    belonging: tuple[str, ...] = ()  # settings that another text sets back to their defaults

    @property
    def settings(self) -> tuple[str, ...]:
        return (self.name, *self.belonging)

    def overrides(self, text: str) -> list[str]:
        with_unit = f"{text} {self.unit}" if self.unit and re.fullmatch(r"[\d.]+", text) else text
        return [f"{self.name}={with_unit or self.if_empty}"]

    def text_of(self, settings: Mapping[str, Any]) -> str:
        value = settings[self.name]
        text = "" if value is None else value_text(value)
        return "" if text == self.if_empty else text.removesuffix(f" {self.unit}")


@dataclass(frozen=True)
class Choice:
    """A field for something in the library, as NAME/VERSION, or for one of ours, by its name."""

    name: str
    label: str
    kind: Kind
    path_setting: str  # names the file or folder
    name_setting: str = ""  # names one of ours
    ours: tuple[str, ...] = ()
    nothing: str = ""  # what it means if nothing is chosen
    belonging: tuple[str, ...] = ()  # settings that another choice sets back to their defaults

    @property
    def settings(self) -> tuple[str, ...]:
        return (self.path_setting, *filter(None, [self.name_setting]), *self.belonging)

    def overrides(self, text: str) -> list[str]:
        """Raises LibraryError: there is no such version, or it has no weights."""
        is_path, in_library = text.startswith(("/", "~")), "/" in text and ":" not in text
        if self.name_setting and not is_path and not in_library:
            return [f"{self.path_setting}=", f"{self.name_setting}={value_text(text)}"]
        path = text if is_path or not text else self._path_in_library(text)
        return [f"{self.path_setting}={value_text(path or None)}"]

    def _path_in_library(self, text: str) -> str:
        name, _, version = text.partition("/")
        found = library.find(self.kind, name, version or None)
        path = self._path_of(found)
        if path is None:
            raise LibraryError(f"{name}, version {found.number}, was uploaded without weights.")
        return str(path)

    def _path_of(self, version: Version) -> Path | None:
        return version.weights if self.path_setting == "model.weights" else version.path

    def text_of(self, settings: Mapping[str, Any]) -> str:
        path: str | None = settings[self.path_setting]
        if path is None:
            return settings[self.name_setting] if self.name_setting else ""
        return next((text for text, version in self._versions() if str(self._path_of(version)) == path), path)

    def uploaded(self) -> dict[str, str]:
        """Return the labels of the versions that can be chosen, by their text, the newest first."""
        return {text: f"{version.name}, version {version.number}" for text, version in self._versions()}

    def _versions(self) -> Iterator[tuple[str, Version]]:
        for entry in library.entries(self.kind):
            for version in reversed(entry.versions):
                if self._path_of(version) is not None:
                    yield f"{entry.name}/{version.version}", version


_HELD_OUT = ("data.val_examples",)
_OF_DATA = ("data.name", "data.args", "data.split", "data.image_size", "data.decoder", "data.sample_weights",
            "data.normalize", "data.augment", "data.transforms", "data.tta", *_HELD_OUT)  # fmt: skip
_OF_OPTIMIZER = tuple(f"optimizer.{name}" for name in sorted({"args"}.union(*OPTIMIZERS.values())))
_FIELDS: tuple[Setting | Choice, ...] = (
    Choice("model", "Model", Kind.MODELS, "model.bundle", "model.name", NETS, belonging=("model.args",)),
    Choice("weights", "Weights", Kind.MODELS, "model.weights", nothing="from the seed"),
    Choice("loader", "Data loader", Kind.LOADERS, "data.bundle", "data.name", tuple(SETS), belonging=_OF_DATA),
    Choice("dataset", "Data set", Kind.DATASETS, "data.root", nothing="in its usual folder"),
    Choice("val_loader", "Validation loader", Kind.LOADERS, "data.val_bundle", nothing="the same", belonging=_HELD_OUT),
    Choice("val_dataset", "Validation set", Kind.DATASETS, "data.val_root", nothing="the same", belonging=_HELD_OUT),
    Setting("optimizer.name", "Optimizer", choices=tuple(OPTIMIZERS), belonging=_OF_OPTIMIZER),
    Setting("optimizer.lr", "Learning rate"),
    Setting("max_grad_norm", "Clip gradients", "to this norm; empty: never"),
    Setting("global_batch_size", "Batch size", "all processes together"),
    Setting("train_for", "Epochs", "or 600 steps", unit="epochs"),
    Setting(
        "keep_every", "Snapshot every", "epochs; empty: the best and the newest", unit="epochs", if_empty="0 steps"
    ),
)
FIELDS: Mapping[str, Setting | Choice] = {each.name: each for each in _FIELDS}
LINES = "lines"  # the field for all other settings, KEY=VALUE; they win over the fields above
# Options of `train` and of `slurm submit`, by their field, and what the fields hold at first.
_LOCAL = {"nproc": "--nproc"}
_SLURM = {"nodes": "--nodes", "per_node": "--nproc", "gpus_per_node": "--gpus-per-node", "time": "--time",
          "partition": "--partition"}  # fmt: skip
PLACES = ("local", "slurm")
WHERE = {"where": "local", "nproc": "1", "nodes": "1", "per_node": "1", "gpus_per_node": "0", "time": "60",
         "partition": ""}  # fmt: skip
LABELS = {
    "config": "Config", "name": "Name", **{each.name: each.label for each in _FIELDS}, LINES: "Other settings",
    "where": "Where", "nproc": "Processes", "nodes": "Nodes", "per_node": "Processes per node",
    "gpus_per_node": "GPUs per node", "time": "Time limit", "partition": "Partition",
}  # fmt: skip
_DEFAULTS = Config(seed=0).flat()
# The field that an error about a setting belongs to.
OWNERS = {setting: each.name for each in _FIELDS for setting in each.settings}


def texts_of(config: Config, base: str) -> dict[str, str]:
    """Return what the fields hold for a job with the settings of `config`, told as changes to the config `base`."""
    texts = shown(config)
    before = shown(load_config(base))
    covered = load_config(base, [override for name in FIELDS for override in overrides_of(name, texts, before)])
    return {"config": base, **texts, LINES: "\n".join(overrides_between(covered, config)), **WHERE}


def nearest_config(config: Config) -> str:
    """Return the bundled config that differs from `config` in the fewest settings."""
    return min(bundled_configs(), key=lambda name: len(overrides_between(load_config(name), config)))


def shown(config: Config) -> dict[str, str]:
    """Return the texts of the fields that show settings."""
    settings = config.flat()
    return {name: each.text_of(settings) for name, each in FIELDS.items()}


def overrides_of(name: str, texts: Texts, before: Texts) -> list[str]:
    """Return the overrides of a field. `before`: the texts of the config that they change."""
    field, text = FIELDS[name], texts[name].strip()
    if text == before[name]:
        return []
    return [*(f"{key}={value_text(_DEFAULTS[key])}" for key in field.belonging), *field.overrides(text)]


def options_of(texts: Texts) -> Mapping[str, str]:
    """Return the options of the command for the chosen place, by their field."""
    return _LOCAL if texts.get("where", "local") == "local" else _SLURM
