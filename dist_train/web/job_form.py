"""What the form of a new job means: a job, or mistakes, each at its field.

Nothing here imports torch or runs user code.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dist_train.config.batch_plan import BatchPlan
from dist_train.config.loading import load_config, overrides_between, parse_override, value_text
from dist_train.config.paths import runs_root
from dist_train.config.schema import Config
from dist_train.data.sets.settings_check import check_settings
from dist_train.errors import ConfigError, DistTrainError, UserCodeError, did_you_mean
from dist_train.launch.jobs import batch_script
from dist_train.launch.slurm.batch_script import BatchScript
from dist_train.launch.slurm.preflight import check_submission
from dist_train.models.names import check_own_name
from dist_train.models.published_weights import is_published
from dist_train.runs.start_options import StartOptions, check_initial_weights, check_run_name, free_name, is_taken
from dist_train.runs.train_arguments import TrainArguments
from dist_train.user_code.bundles import find_bundled
from dist_train.user_code.importing import check_object_source
from dist_train.user_code.source_check import DATASET_FILE, MODEL_FILE, check_source
from dist_train.web.job_fields import (
    FIELDS,
    LABELS,
    LINES,
    OWNERS,
    PLACES,
    WHERE,
    Texts,
    options_of,
    overrides_of,
    shown,
)


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
        """Note a mistake in a field."""
        self.errors[name] = "\n".join(filter(None, [self.errors.get(name), str(error)]))


def check(texts: Texts, folder: Path) -> Checked:
    """Check a form for a job in the folder of runs `folder`. Fields that are missing are as in the config."""
    found, texts = Checked(), {**WHERE, **texts}
    for name in sorted(texts.keys() - LABELS.keys()):  # written by hand, as with curl
        near = did_you_mean(name, list(LABELS))
        found.refuse(LINES, f"There is no field {name}.{near} Settings without a field go into {LINES}, as name=value.")
    if texts["where"] not in PLACES:
        found.refuse("where", f"where={texts['where']}: write {' or '.join(PLACES)}.")
    config = _config(texts, found)
    _check_name(texts.get("name", ""), folder, found)
    numbers = {name: _whole_number(name, option, texts[name], found) for name, option in options_of(texts).items()
               if name not in ("time", "partition")}  # fmt: skip
    if config is not None and not found.errors.keys() & {*numbers, "name", "where"}:
        try:
            found.job = _job(config, texts, numbers, folder)
        except DistTrainError as error:
            found.refuse(field_of(str(error), texts), error)
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
    plan = BatchPlan.of(config, world_size)
    script = None
    if not is_local:
        script = batch_script(
            arguments, config, start, nodes=numbers["nodes"], nproc=numbers["per_node"],
            gpus_per_node=numbers["gpus_per_node"], time=texts["time"].strip(),
            partition=texts["partition"].strip() or None,
        )  # fmt: skip
        check_submission(script, config)
    given = {option: texts[name].strip() for name, option in options_of(texts).items()}
    options = {option: text for option, text in given.items() if text not in ("", "0")}
    return Job(config, plan, arguments, start, options, script)


def _config(texts: Texts, found: Checked) -> Config | None:
    """Return the settings; refuse the fields that are wrong."""
    try:
        before = shown(load_config(texts.get("config", "")))
    except ConfigError as error:
        found.refuse("config", error)
        return None
    overrides = []
    for name in (name for name in FIELDS if name in texts):
        try:
            overrides += _parsed(overrides_of(name, texts, before))
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
            found.refuse(field_of(line, texts), line)
        return None
    for check_one in (_check_net, _check_data, _check_optimizer):
        try:
            check_one(config)
        except DistTrainError as error:
            found.refuse(field_of(str(error), texts), error)
    return config


def _check_net(config: Config) -> None:
    """Check that the net is there, as far as its name and its source show it."""
    model = config.model
    if model.weights is None or not is_published(model.weights):  # that would import torchvision
        check_initial_weights(config)
    if model.bundle is not None:
        _check_bundle(model.bundle, MODEL_FILE, "model.bundle")
    elif ":" not in model.name:
        check_own_name(model)
    elif not model.name.startswith(("torchvision:", "timm:")):
        check_object_source("model.name", model.name)


def _check_optimizer(config: Config) -> None:
    """Check that optimizer and schedule are there, as far as their names and their source show it."""
    if ":" in config.optimizer.name and not config.optimizer.name.startswith("timm:"):
        check_object_source("optimizer.name", config.optimizer.name)
    if ":" in config.schedule.name:
        check_object_source("schedule.name", config.schedule.name)


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
    if os.path.isfile(os.path.expanduser(path)) and path.suffix != ".py":  # noqa: PTH111,PTH113 - never raise
        return None
    return find_bundled(path, filename, f"{setting}={path}").parent


def _check_name(name: str, folder: Path, found: Checked) -> None:
    try:
        if not name:
            raise ConfigError("--run-name is empty: give the job a name.")
        check_run_name("--run-name", name, folder)
        if is_taken(name, folder):
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


def field_of(error: str, texts: Texts, otherwise: str = LINES) -> str:
    """Return the field that an error is about; `otherwise` if it names neither a setting nor an option."""
    match = re.match(r"(?:Unknown setting |The config: )?([\w.]+?)(?:=|: |\. )", error)
    key = match[1] if match else ""
    typed = map(_key, _lines(texts))
    if any(f"{key}.".startswith(f"{each}.") or f"{each}.".startswith(f"{key}.") for each in typed if key):
        return LINES
    options = (name for name, option in options_of(texts).items() if option in error)
    return OWNERS.get(key) or OWNERS.get(f"{key}.name") or next(options, otherwise)
