"""The form of a new job: its fields, the settings that they stand for, and what is wrong with them.

Nothing here imports torch or runs user code.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from dist_train.config.batch_plan import BatchPlan
from dist_train.config.loading import bundled_configs, load_config, overrides_between, parse_override, value_text
from dist_train.config.paths import runs_root
from dist_train.config.schema import OPTIMIZERS, Config
from dist_train.data.sets.catalog import SETS
from dist_train.data.sets.settings_check import check_settings
from dist_train.errors import ConfigError, DistTrainError, LibraryError, UserCodeError
from dist_train.launch.jobs import batch_script
from dist_train.launch.slurm.batch_script import BatchScript
from dist_train.launch.slurm.preflight import check_submission
from dist_train.models.names import NETS, check_own_name
from dist_train.runs.start_options import StartOptions, check_initial_weights, check_run_name
from dist_train.runs.train_arguments import TrainArguments
from dist_train.user_code import library
from dist_train.user_code.bundles import find_bundled
from dist_train.user_code.importing import check_object_source
from dist_train.user_code.library import Kind, Version
from dist_train.user_code.source_check import DATASET_FILE, MODEL_FILE, check_source

Texts = Mapping[str, str]  # by field


# --- the fields and their settings ---------------------------------------------------------------------------------


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
    path: str  # the setting that names the file or folder
    by_name: str = ""  # the setting that names one of ours
    ours: tuple[str, ...] = ()
    nothing: str = ""  # what it means if nothing is chosen
    belonging: tuple[str, ...] = ()  # settings that another choice sets back to their defaults

    def overrides(self, text: str) -> list[str]:
        """Raises LibraryError: there is no such version, or it has no weights."""
        is_path, in_library = text.startswith(("/", "~")), "/" in text and ":" not in text
        if self.by_name and not is_path and not in_library:
            return [f"{self.path}=", f"{self.by_name}={value_text(text)}"]
        path = text if is_path or not text else self._path_in_library(text)
        return [f"{self.path}={value_text(path or None)}"]

    def _path_in_library(self, text: str) -> str:
        name, _, version = text.partition("/")
        found = library.find(self.kind, name, version or None)
        path = self._path_of(found)
        if path is None:
            raise LibraryError(f"{name}, version {found.number}, was uploaded without weights.")
        return str(path)

    def _path_of(self, version: Version) -> Path | None:
        return version.weights if self.path == "model.weights" else version.path

    def text_of(self, settings: Mapping[str, Any]) -> str:
        path: str | None = settings[self.path]
        if path is None:
            return settings[self.by_name] if self.by_name else ""
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
_OF_DATA = ("data.name", "data.args", "data.split", "data.image_size", "data.normalize", "data.augment",
            *_HELD_OUT)  # fmt: skip
_OF_OPTIMIZER = tuple(f"optimizer.{name}" for name in sorted(set().union(*OPTIMIZERS.values())))
_FIELDS: tuple[Setting | Choice, ...] = (
    Choice("model", "Model", Kind.MODELS, "model.bundle", "model.name", NETS, belonging=("model.args",)),
    Choice("weights", "Weights", Kind.MODELS, "model.weights", nothing="from the seed"),
    Choice("loader", "Data loader", Kind.LOADERS, "data.bundle", "data.name", tuple(SETS), belonging=_OF_DATA),
    Choice("dataset", "Data set", Kind.DATASETS, "data.root", nothing="in its usual folder"),
    Choice(
        "val_loader", "Loader for validation", Kind.LOADERS, "data.val_bundle", nothing="the same", belonging=_HELD_OUT
    ),
    Choice(
        "val_dataset",
        "Data set for validation",
        Kind.DATASETS,
        "data.val_root",
        nothing="the same",
        belonging=_HELD_OUT,
    ),
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
_LOCAL = {"nproc": "--nproc"}
_SLURM = {"nodes": "--nodes", "per_node": "--nproc", "gpus_per_node": "--gpus-per-node", "time": "--time",
          "partition": "--partition"}  # fmt: skip
WHERE = {"where": "local", "nproc": "1", "nodes": "1", "per_node": "1", "gpus_per_node": "0", "time": "60",
         "partition": ""}  # fmt: skip
LABELS = {
    "config": "Config", "name": "Name", **{each.name: each.label for each in _FIELDS}, LINES: "Other settings",
    "where": "Where", "nproc": "Processes", "nodes": "Nodes", "per_node": "Processes per node",
    "gpus_per_node": "GPUs per node", "time": "Time limit", "partition": "Partition",
}  # fmt: skip
_DEFAULTS = Config(seed=0).flat()
_OWNERS = {each.name: each.name for each in _FIELDS if isinstance(each, Setting)} | {
    key: each.name for each in _FIELDS if isinstance(each, Choice) for key in (each.path, each.by_name, *each.belonging)
}


def texts_of(config: Config, base: str) -> dict[str, str]:
    """Return what the fields hold for a job with the settings of `config`, told as changes to the config `base`."""
    texts = _shown(config)
    covered = load_config(
        base, [each for name in FIELDS for each in _overrides(name, texts, _shown(load_config(base)))]
    )
    return {"config": base, **texts, LINES: "\n".join(overrides_between(covered, config)), **WHERE}


def nearest_config(config: Config) -> str:
    """Return the bundled config that differs from `config` in the fewest settings."""
    return min(bundled_configs(), key=lambda name: len(overrides_between(load_config(name), config)))


def free_name(wanted: str, folder: Path) -> str:
    """Return `wanted`, with the first number behind it that no run in `folder` has."""
    stem = re.sub(r"-\d+$", "", wanted)
    return next(name for number in count(1) if not _exists(name := f"{stem}-{number}", folder))


def _exists(name: str, folder: Path) -> bool:
    return os.path.lexists(folder / name)  # False, not an error, for a name that no file can have


def _shown(config: Config) -> dict[str, str]:
    settings = config.flat()
    return {name: each.text_of(settings) for name, each in FIELDS.items()}


def _overrides(name: str, texts: Texts, before: Texts) -> list[str]:
    """Return the overrides of a field. `before`: the texts of the config that they change."""
    shown, text = FIELDS[name], texts[name].strip()
    if text == before[name]:
        return []
    return [*(f"{key}={value_text(_DEFAULTS[key])}" for key in shown.belonging), *shown.overrides(text)]


# --- checking ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A job that can be created."""

    config: Config
    plan: BatchPlan
    arguments: TrainArguments
    start: StartOptions
    options: Mapping[str, str]  # of the command, besides its settings
    script: BatchScript | None  # None: for this machine

    @property
    def name(self) -> str:
        return self.arguments.run_name or ""

    @property
    def nproc(self) -> int:
        return self.plan.world_size

    @property
    def command(self) -> str:
        """The command that does the same, for a shell."""
        verb = ["train"] if self.script is None else ["slurm", "submit"]
        options = [part for option in self.options.items() for part in option]
        settings = [*self.arguments.overrides, "--run-name", self.name]
        return shlex.join(["dist-train", *verb, "-c", self.arguments.config_name or "", *options, *settings])


@dataclass
class Checked:
    """What a form means: a job, or what is wrong with it."""

    job: Job | None = None
    errors: dict[str, str] = field(default_factory=dict)  # by field

    def refuse(self, name: str, error: object) -> None:
        self.errors[name] = "\n".join(filter(None, [self.errors.get(name), str(error)]))


def check(texts: Texts, folder: Path) -> Checked:
    """Check a form for a job in the folder of runs `folder`. Fields that are missing are as in the config."""
    found, texts = Checked(), {**WHERE, **texts}
    config = _config(texts, found)
    _check_name(texts.get("name", ""), folder, found)
    options = _LOCAL if texts["where"] == "local" else _SLURM
    numbers = {name: _whole_number(name, option, texts[name], found) for name, option in options.items()
               if name not in ("time", "partition")}  # fmt: skip
    if config is not None and not found.errors.keys() & {*numbers, "name"}:
        try:
            found.job = _job(config, texts, numbers, folder)
        except DistTrainError as error:
            found.refuse(_field_of(str(error), texts, options), error)
    return Checked(None, found.errors) if found.errors else found


def _job(config: Config, texts: Texts, numbers: Mapping[str, int], folder: Path) -> Job:
    """Raises ConfigError or DataError: the job cannot be run like this."""
    overrides = overrides_between(load_config(texts["config"]), config)
    if runs_root().absolute() != folder.absolute():
        overrides.append(f"runs_dir={value_text(str(folder.absolute()))}")
    arguments = TrainArguments(config_name=texts["config"], overrides=tuple(overrides), run_name=texts["name"])
    config, start = arguments.resolve(time.perf_counter())
    is_local = texts["where"] == "local"
    world_size = numbers["nproc"] if is_local else numbers["nodes"] * numbers["per_node"]
    plan = BatchPlan.fit(config.global_batch_size, config.per_device_batch_size, world_size)
    script = None
    if not is_local:
        script = batch_script(
            arguments, config, start, nodes=numbers["nodes"], nproc=numbers["per_node"],
            gpus_per_node=numbers["gpus_per_node"], time=texts["time"].strip(),
            partition=texts["partition"].strip() or None,
        )  # fmt: skip
        check_submission(script, config)
    names = _LOCAL if is_local else _SLURM
    options = {option: texts[name].strip() for name, option in names.items() if texts[name].strip() not in ("", "0")}
    return Job(config, plan, arguments, start, options, script)


def _config(texts: Texts, found: Checked) -> Config | None:
    """Return the settings; refuse the fields that are wrong."""
    try:
        before = _shown(load_config(texts.get("config", "")))
    except ConfigError as error:
        found.refuse("config", error)
        return None
    overrides = []
    for name in (name for name in FIELDS if name in texts):
        try:
            overrides += _parsed(_overrides(name, texts, before))
        except DistTrainError as error:
            found.refuse(name, error)
    for line in _lines(texts):
        try:
            overrides += _parsed([line])
            if _key(line) == "runs_dir":
                raise ConfigError("runs_dir is the folder that this page shows. Leave it out.")
        except ConfigError as error:
            found.refuse(LINES, error)
    try:
        config = load_config(texts["config"], overrides)
    except ConfigError as error:
        for line in str(error).splitlines():
            found.refuse(_field_of(line, texts), line)
        return None
    for check_one in (_check_net, _check_data):
        try:
            check_one(config)
        except DistTrainError as error:
            found.refuse(_field_of(str(error), texts), error)
    return config


def _check_net(config: Config) -> None:
    """Check that the net is there, as far as its name and its source show it."""
    model = config.model
    check_initial_weights(config)
    if model.bundle is not None:
        _check_bundle(model.bundle, MODEL_FILE, "model.bundle")
    elif ":" not in model.name:
        check_own_name(model)
    elif not model.name.startswith(("torchvision:", "timm:")):
        check_object_source("model.name", model.name)


def _check_data(config: Config) -> None:
    """Check that the data loaders are there, as far as their names and their source show it."""
    check_settings(config.data)
    if config.data.val_bundle is not None:
        _folder_of(config.data.val_bundle, DATASET_FILE, "data.val_bundle")
    if config.data.bundle is not None:
        _check_bundle(config.data.bundle, DATASET_FILE, "data.bundle")
    elif ":" in config.data.name:
        check_object_source("data.name", config.data.name)


def _check_bundle(path: Path, filename: str, setting: str) -> None:
    folder = _folder_of(path, filename, setting)
    problems = check_source(folder, filename).problems if folder is not None else ()
    if problems:
        raise UserCodeError("\n".join(f"{setting}={path}: {problem}" for problem in problems))


def _folder_of(path: Path, filename: str, setting: str) -> Path | None:
    """Return the folder of a bundle's file; None if it is in a zip, which is unpacked when the job starts."""
    if path.expanduser().is_file() and path.suffix != ".py":
        return None
    return find_bundled(path, filename, f"{setting}={path}").parent


def _check_name(name: str, folder: Path, found: Checked) -> None:
    try:
        if not name:
            raise ConfigError("--run-name is empty: give the job a name.")
        check_run_name("--run-name", name, folder)
        if _exists(name, folder):
            raise ConfigError(f"--run-name={name}: there is a run of this name. Use {free_name(name, folder)}.")
    except ConfigError as error:
        found.refuse("name", error)


def _whole_number(name: str, option: str, text: str, found: Checked) -> int:
    least = 0 if name == "gpus_per_node" else 1
    if re.fullmatch(r"[0-9]{1,6}", text.strip()) and int(text) >= least:
        return int(text)
    found.refuse(name, f"{option}={text}: write a whole number, {least} or more.")
    return least


def _parsed(overrides: list[str]) -> list[str]:
    """Raises ConfigError: one of them does not have the form of an override."""
    for override in overrides:
        parse_override(override)
    return overrides


def _lines(texts: Texts) -> list[str]:
    return [line.strip() for line in texts.get(LINES, "").splitlines() if line.strip()]


def _key(override: str) -> str:
    return override.partition("=")[0].strip()


def _field_of(error: str, texts: Texts, options: Mapping[str, str] = {}) -> str:
    """Return the field that an error is about. `options`: those that it may name, by their field."""
    match = re.match(r"(?:Unknown setting )?([\w.]+?)(?:=|: |\. )", error)
    key = match[1] if match else ""
    typed = map(_key, _lines(texts))
    if any(f"{key}.".startswith(f"{each}.") or f"{each}.".startswith(f"{key}.") for each in typed if key):
        return LINES
    for name, option in options.items():
        if option in error:
            return name
    return _OWNERS.get(key) or _OWNERS.get(f"{key}.name") or LINES
