"""The settings: every one with its type, default and meaning.

A run is one config file. Defaults stand here and nowhere else. A setting is marked `MayChange` where another value at a
resume cannot change the result; all others must agree when a run is resumed.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    NonNegativeFloat,
    NonNegativeInt,
    PlainSerializer,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from dist_train.config.durations import Duration, ScheduleName

_log = logging.getLogger(__name__)

MayChange = "free"  # may differ between the starts of one run

Precision = Literal["no", "bf16", "fp16"]
StepMode = Literal["eager", "compile", "graph"]
WantedMode = Literal["auto", StepMode]


def _clock_free(text: object) -> Duration:
    duration = Duration.parse(text)
    if duration.unit == "s":
        raise ValueError("count it in steps or epochs: a moment set by the clock would not be the same after a resume")
    return duration


def _yaml_no(value: object) -> object:
    return "no" if value is False else value  # YAML reads a bare `no` as False


def _without_nul(path: Path) -> Path:
    if "\0" in str(path):
        raise ValueError("no path has a NUL in it")
    return path


_AsText = PlainSerializer(str, when_used="always")
Steps = Annotated[Duration, BeforeValidator(_clock_free), _AsText]  # steps or epochs
StepsOrSeconds = Annotated[Duration, BeforeValidator(Duration.parse), _AsText]
Options = dict[str, JsonValue]  # keyword arguments for a class chosen by name
Fraction = Annotated[float, Field(ge=0, lt=1)]
BatchSize = Annotated[int, Field(gt=0, lt=2**31)]
FilePath = Annotated[Path, AfterValidator(_without_nul)]
Seconds = Annotated[float, Field(gt=0, lt=2**31)]  # more is no time that a clock of the system can wait for


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        kinds = _kinds(cls.model_fields[info.field_name or ""].annotation)
        if isinstance(value, bool) and (int in kinds or float in kinds) and bool not in kinds:
            raise ValueError("write a number, not yes or no")  # max_grad_norm: yes would be 1.0
        return value


class Normalize(_Settings):
    """Pixels become (x / 255 - mean) / std, one number per channel."""

    mean: list[float]
    std: list[PositiveFloat]

    @model_validator(mode="after")
    def _same_channels(self) -> Normalize:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels and std {len(self.std)}; give as many of each")
        return self


class AugmentConfig(_Settings):
    """Drawn anew for each example of each step, on the device."""

    shift: NonNegativeInt = 0  # pixels, up to so many in each direction; black comes in
    flip: bool = False  # left for right, every other time


class DataConfig(_Settings):
    name: str = "mnist"  # a data set of `dist-train data ls`, image_folder, or package.module:Name
    bundle: FilePath | None = None  # BK.Synapse user code (folder or zip with bks_dataset.py) instead of a name
    root: Annotated[FilePath | None, MayChange] = None  # None: $DIST_TRAIN_DATA_DIR, else the user's cache folder
    split: str | None = None  # emnist only: balanced, byclass, bymerge, digits, letters or mnist
    image_size: PositiveInt | None = None  # image_folder only: pixels per side
    val_examples: NonNegativeInt = 0  # held out of train for validation; 0: validate on val/ or on the test split
    normalize: Normalize | None = None  # None: pixels / 255, nothing else
    augment: AugmentConfig | None = None  # of training images
    num_workers: Annotated[int, Field(ge=0, le=1024), MayChange] = 0  # loader processes per rank, of a streamed set
    resident: Annotated[bool | None, MayChange] = None  # whole set on the device; None: when it can be and fits
    args: Options = {}  # keyword arguments of package.module:Name


class ModelConfig(_Settings):
    name: str = "mlp"  # mlp, bks, guide, conv, fast, speedrun, torchvision:NAME, timm:NAME or package.module:Class
    bundle: FilePath | None = None  # BK.Synapse user code (folder or zip with bks_model.py) instead of a name
    args: Options = {}  # keyword arguments of the net, as in model.args.dropout=0


# Settings that belong to each optimizer besides lr; None in OptimizerConfig leaves torch's default.
OPTIMIZERS: dict[str, frozenset[str]] = {
    "adam": frozenset({"betas", "eps", "weight_decay", "amsgrad"}),
    "adamw": frozenset({"betas", "eps", "weight_decay", "amsgrad"}),
    "sgd": frozenset({"momentum", "weight_decay", "nesterov", "dampening"}),
    "adadelta": frozenset({"rho", "eps", "weight_decay"}),
    "rmsprop": frozenset({"alpha", "eps", "weight_decay", "momentum", "centered"}),
}


class OptimizerConfig(_Settings):
    name: Literal["adam", "adamw", "sgd", "adadelta", "rmsprop"] = "adam"
    lr: PositiveFloat = 1e-3
    betas: tuple[Fraction, Fraction] | None = None
    momentum: NonNegativeFloat | None = None
    dampening: float | None = None
    nesterov: bool | None = None
    weight_decay: NonNegativeFloat | None = None
    eps: PositiveFloat | None = None
    amsgrad: bool | None = None
    alpha: Fraction | None = None
    rho: Fraction | None = None
    centered: bool | None = None
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"  # with global_batch_size / lr_base_batch_size
    lr_base_batch_size: PositiveInt | None = None  # the batch size that lr was chosen for

    @model_validator(mode="after")
    def _fits(self) -> OptimizerConfig:
        own = OPTIMIZERS[self.name]
        strange = sorted(self._given() - own)
        if strange:
            raise ValueError(f"{self.name} has no {', '.join(strange)}. Its settings: lr, {', '.join(sorted(own))}")
        if (self.lr_scaling == "none") != (self.lr_base_batch_size is None):
            raise ValueError("lr_scaling (linear or sqrt) and lr_base_batch_size go together; set both or neither")
        return self

    def _given(self) -> set[str]:
        return {key for key in set().union(*OPTIMIZERS.values()) if getattr(self, key) is not None}

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that were set, lr not among them."""
        return {key: getattr(self, key) for key in sorted(self._given())}

    def scaled_lr(self, global_batch_size: int) -> float:
        """The learning rate after the scaling rule (linear: Goyal et al., arXiv 1706.02677)."""
        ratio = global_batch_size / (self.lr_base_batch_size or global_batch_size)
        factors: dict[str, float] = {"none": 1.0, "linear": ratio, "sqrt": ratio**0.5}
        return self.lr * factors[self.lr_scaling]


class ScheduleConfig(_Settings):
    name: ScheduleName = "constant"
    warmup: Steps = Duration(0)  # linear rise from 0; of one_cycle the rising part, 0 = 30 % of the run
    final_ratio: Fraction = 0.0  # of cosine and linear: where the fall ends, as a part of the peak


class EarlyStopConfig(_Settings):
    patience: PositiveInt  # evaluations without a better result before the run ends
    min_delta: NonNegativeFloat = 0.0  # a smaller gain does not count as better


class DdpConfig(_Settings):
    find_unused_parameters: bool = False  # for nets that leave weights out of some steps
    sync_batchnorm: bool = False  # BatchNorm statistics over all ranks; GPUs only


class TrackingConfig(_Settings):
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online if a key is there, else offline
    project: str = "dist_train"
    entity: str | None = None
    name: str | None = None  # None: of the run directory
    group: str | None = None  # None: the sweep, if it is of one
    job_type: str = "train"
    tags: list[str] = []
    tensorboard: bool = False
    pictures: bool = True  # of a finished run: curves, confusion matrix, mistakes; in pictures/ and in W&B
    artifact: bool = False  # the best checkpoint's weights to W&B, as an artifact
    timeout_s: Seconds = 60.0  # W&B gets half of it to begin, and at the end of the run all of it to take what is left


class Config(_Settings):
    seed: int = Field(0, ge=0, lt=2**63)
    train_for: Steps = Duration(5, "epochs")
    global_batch_size: BatchSize = 64  # examples per optimizer step, over all ranks and micro-steps
    per_device_batch_size: Annotated[BatchSize, MayChange] = 1024  # at most per forward: lower it if memory is short
    mixed_precision: Annotated[Precision | None, BeforeValidator(_yaml_no)] = None  # None: the launcher's, else no
    dtype: Literal["float32", "float64"] = "float32"  # float64: slow; shows that a difference is rounding and no fault
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], MayChange] = "auto"
    step_mode: Annotated[WantedMode, MayChange] = "auto"  # form of the update: equal within rounding
    max_grad_norm: PositiveFloat | None = None  # clip the global L2 norm of the gradient
    label_smoothing: Fraction = 0.0
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None  # evaluate and save averaged weights
    early_stop: EarlyStopConfig | None = None
    log_every: Annotated[Steps, MayChange] = Duration(100)  # this and the next two: 0 = only at the end
    eval_every: Steps = Duration(1, "epochs")
    save_every: Annotated[StepsOrSeconds, MayChange] = Duration(1, "epochs")
    keep_last: Annotated[PositiveInt, MayChange] = 2  # newest checkpoints that stay
    keep_best: Annotated[NonNegativeInt, MayChange] = 1  # best checkpoints that stay besides
    keep_every: Annotated[Steps, MayChange] = Duration(0)  # checkpoints at these steps stay for good; 0 = none
    # A rank that others wait for longer than this, or that does not get on for so long, ends the run.
    stall_timeout_s: Annotated[Seconds, MayChange] = 600.0
    setup_timeout_s: Annotated[Seconds, MayChange] = 1800.0  # until the first step: meeting, restoring, compiling
    preempt_signal: Annotated[Literal["USR1", "USR2"], MayChange] = "USR1"  # save and stop, to be started again later
    final_train_eval: bool = True  # at the end, an exact pass over the training set in eval mode
    runs_dir: Annotated[FilePath | None, MayChange] = None  # None: $DIST_TRAIN_RUNS_DIR, else runs
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    ddp: DdpConfig = DdpConfig()
    tracking: Annotated[TrackingConfig, MayChange] = TrackingConfig()

    @model_validator(mode="after")
    def _trains(self) -> Config:
        if not self.train_for.value:
            raise ValueError(f"train_for={self.train_for} trains nothing; write for example 5 epochs or 600 steps")
        return self

    def flat(self) -> dict[str, Any]:
        """Settings by dotted name: {"optimizer.lr": 0.001, ...}."""
        return dict(_flatten(self.model_dump(mode="json")))

    def result_diff(self, other: Config) -> dict[str, tuple[Any, Any]]:
        """Settings in which the two differ and that can change the result: {name: (mine, other's)}."""
        mine, theirs = self.result_settings(), other.result_settings()
        return {key: (mine.get(key), theirs.get(key)) for key in mine | theirs if mine.get(key) != theirs.get(key)}

    def result_settings(self) -> dict[str, Any]:
        """Those of `flat` that can change the result."""
        return {key: value for key, value in self.flat().items() if not _is_free(key)}


def _flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in tree.items():
        nested = isinstance(value, dict) and key != "args"
        pairs += _flatten(value, f"{prefix}{key}.") if nested else [(prefix + key, value)]
    return pairs


def _kinds(annotation: Any) -> list[Any]:
    """The plain types inside an annotation such as `PositiveFloat | None`."""
    inner = get_args(annotation)
    return [kind for part in inner for kind in _kinds(part)] if inner else [annotation]


def section_of(annotation: Any) -> type[_Settings] | None:
    """The section class inside an annotation such as `EarlyStopConfig | None`."""
    candidates = (annotation, *get_args(annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, _Settings)), None)


def _is_free(key: str) -> bool:
    section: type[_Settings] | None = Config
    for part in key.split("."):
        field = section.model_fields.get(part) if section else None
        if field is None:
            return False
        if MayChange in field.metadata:
            return True
        section = section_of(field.annotation)
    return False
