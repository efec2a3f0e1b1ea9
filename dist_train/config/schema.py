"""Every setting with its type, default and meaning.

One config file describes one run. Defaults are defined only here. A setting marked `MayChange` may have another value
when a run resumes, because that cannot change the result; all others must stay the same.
"""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BeforeValidator,
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

from dist_train.config.augment import AugmentConfig, NamedTransform
from dist_train.config.durations import Duration
from dist_train.config.metric_names import Task, check_metrics, direction
from dist_train.config.profiled_steps import ProfiledSteps
from dist_train.config.section import Section
from dist_train.errors import did_you_mean

_log = logging.getLogger(__name__)

MayChange = "free"  # may differ between the starts of one run

Precision = Literal["no", "bf16", "fp16"]
StepMode = Literal["eager", "compile", "graph"]
WantedMode = Literal["auto", StepMode]


def _not_seconds(text: object) -> Duration:
    duration = Duration.parse(text)
    if duration.unit == "s":
        raise ValueError("write it in steps or epochs: a time in seconds would fall on another step after a resume")
    return duration


def _with_unit(text: object) -> object:
    number = str(text).strip()
    if re.fullmatch(r"[\d.]+", number):
        raise ValueError(f"{number} epochs or {number} steps? Write the unit")
    return text


def _not_zero(duration: Duration) -> Duration:
    if not duration.value:
        raise ValueError("it must be longer than zero")
    return duration


def _schedule_or_own(name: str) -> str:
    if name not in SCHEDULES and not re.fullmatch(r"[\w.]+:\w+", name):
        raise ValueError(
            f"no such schedule.{did_you_mean(name, SCHEDULES)} Names: {', '.join(SCHEDULES)}, package.module:function"
        )
    return name


def _optimizer_or_own(name: str) -> str:
    if name not in OPTIMIZERS and not re.fullmatch(r"[\w.]+:\w+", name):
        raise ValueError(
            f"no such optimizer.{did_you_mean(name, OPTIMIZERS)} Names: {', '.join(OPTIMIZERS)}, timm:NAME, "
            f"package.module:Class"
        )
    return name


def _yaml_no(value: object) -> object:
    return "no" if value is False else value  # YAML reads a bare `no` as False


def _without_nul(path: Path) -> Path:
    if "\0" in str(path):
        raise ValueError("a path must not contain a NUL character")
    return path


_AsText = PlainSerializer(str, when_used="always")
Steps = Annotated[Duration, BeforeValidator(_not_seconds), _AsText]  # "600 steps" (also as 600) or "3 epochs"
PositiveSteps = Annotated[Steps, AfterValidator(_not_zero)]
StepsOrSeconds = Annotated[Duration, BeforeValidator(Duration.parse), _AsText]  # also "30 s"
StepsFrom = Annotated[ProfiledSteps, BeforeValidator(ProfiledSteps.parse), _AsText]  # "20 steps from 100"
Options = dict[str, JsonValue]  # keyword arguments of a class that a setting names
Fraction = Annotated[float, Field(ge=0, lt=1)]
BatchSize = Annotated[int, Field(gt=0, lt=2**31)]
FilePath = Annotated[Path, AfterValidator(_without_nul)]
Seconds = Annotated[float, Field(gt=0, lt=2**31)]  # the upper bound of the system's timers


class Normalize(Section):
    """Normalisation of pixels x (0 to 255): (x / 255 - mean) / std."""

    mean: list[float]  # one number per channel, on the scale 0 to 1
    std: list[PositiveFloat]  # one number per channel

    @model_validator(mode="after")
    def _same_channels(self) -> Normalize:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels and std {len(self.std)}; give both the same number")
        return self


class DataConfig(Section):
    # A data set listed by `dist-train data ls`, `image_folder`, or your own class as `package.module:Name`.
    name: str = "mnist"
    bundle: FilePath | None = None  # BK.Synapse user code, used instead of `name`: folder or zip with bks_dataset.py
    # Folder of the data. None: $DIST_TRAIN_DATA_DIR, else the folder dist_train in the user's cache folder.
    root: Annotated[FilePath | None, MayChange] = None
    # A validation set of its own: the loader's val split, else its test split, else its training split, read from
    # this folder instead of `root`. The training set's own val split is not used; its test split stays the test split.
    val_root: Annotated[FilePath | None, MayChange] = None
    # Another loader for the validation set, as `bundle`: its UserValDataset, else its UserDataset, which reads
    # `val_root`, else `root`.
    val_bundle: FilePath | None = None
    split: str | None = None  # for emnist only: balanced, byclass, bymerge, digits, letters or mnist
    image_size: PositiveInt | None = None  # for image_folder only: pixels per side of the resized square images
    # Training examples held out for validation; not with a validation set of its own. 0: validate on `val_root` or
    # `val_bundle`, else on the set's own val split, else on its test split.
    val_examples: NonNegativeInt = 0
    # How an epoch chooses its examples. shuffled: each at most once. balanced: drawn with replacement, every class
    # equally likely.
    sampling: Literal["shuffled", "balanced"] = "shuffled"
    # Draw with replacement in proportion to these weights: a .npy file or a text file with one number >= 0 per example
    # of the training set, in its order, those held out for validation included.
    sample_weights: FilePath | None = None
    normalize: Normalize | None = None  # None: pixels / 255 only
    augment: AugmentConfig | None = None  # random changes of training images; None: no changes
    # torchvision's transforms of each training image as it is loaded, before `augment`: names, or names with arguments,
    # such as [RandomResizedCrop, {RandAugment: {magnitude: 5}}].
    transforms: list[NamedTransform] = []
    # Also evaluate the mean output over views of each image, as accuracy_tta. flip: it and its mirror image. shift: it
    # also moved by a pixel along the diagonal, each way. flip_shift: both. None: accuracy alone.
    tta: Annotated[Literal["flip", "shift", "flip_shift"] | None, MayChange] = None
    # Worker processes per rank that load a streamed data set. 0: the training process loads it.
    num_workers: Annotated[int, Field(ge=0, le=1024), MayChange] = 0
    # Keep the whole data set in device memory instead of streaming it. None: if that is possible and it fits.
    resident: Annotated[bool | None, MayChange] = None
    args: Options = {}  # keyword arguments of your own class: data.args.KEY=VALUE


class ModelConfig(Section):
    # mlp, bks, guide, conv, fast, speedrun, torchvision:NAME, timm:NAME, or your own class as package.module:Class.
    name: str = "mlp"
    bundle: FilePath | None = None  # BK.Synapse user code, used instead of `name`: folder or zip with bks_model.py
    # Initial weights: a .safetensors file or a .pth file with a state dict, also of a net that DDP, torch.compile or
    # AveragedModel wrapped; a run: its best checkpoint, else its last; or ResNet18_Weights.IMAGENET1K_V1 and the like,
    # in the cache of torch.hub. All must fit; a last layer of another shape is left out. None: drawn from the seed.
    weights: FilePath | None = None
    # Not trained: parameters whose name, or that of a module around them, matches one of these patterns, such as
    # [conv1, layer*]. Their BatchNorm layers normalise by the running statistics and keep them.
    freeze: list[str] = []
    freeze_until: PositiveSteps | None = None  # train all of the net from here on; None: never
    args: Options = {}  # keyword arguments of the net's class, for example model.args.dropout=0

    @model_validator(mode="after")
    def _freezes(self) -> ModelConfig:
        if self.freeze_until is not None and not self.freeze:
            raise ValueError(f"freeze_until={self.freeze_until} needs freeze, such as freeze=[conv1, layer*]")
        return self


# The settings of each optimizer besides lr: keyword arguments of its torch.optim class. None keeps torch's default.
OPTIMIZERS: dict[str, frozenset[str]] = {
    "adam": frozenset({"betas", "eps", "weight_decay", "amsgrad"}),
    "adamw": frozenset({"betas", "eps", "weight_decay", "amsgrad"}),
    "sgd": frozenset({"momentum", "weight_decay", "nesterov", "dampening"}),
    "adadelta": frozenset({"rho", "eps", "weight_decay"}),
    "rmsprop": frozenset({"alpha", "eps", "weight_decay", "momentum", "centered"}),
    "muon": frozenset({"weight_decay"}),
}


class GroupConfig(Section):
    """Parameters with a learning rate or weight decay of their own. The first group that matches one takes it."""

    match: str  # name of a parameter or of a module around it; * stands for any text
    lr_factor: PositiveFloat = 1.0  # of the scheduled learning rate
    weight_decay: NonNegativeFloat | None = None  # None: that of the optimizer


class OptimizerConfig(Section):
    # adam, adamw, sgd, adadelta, rmsprop, muon (with AdamW for all but the matrices of hidden layers), timm:NAME, or a
    # class of torch.optim or your own as package.module:Class.
    name: Annotated[str, AfterValidator(_optimizer_or_own)] = "adam"
    lr: PositiveFloat = 1e-3  # peak learning rate, before lr_scaling
    # From betas to centered: keyword arguments of the torch.optim class (see OPTIMIZERS); None keeps its default.
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
    # Keyword arguments of torch.optim.Muon, of timm's optimizer or of your class: optimizer.args.KEY=VALUE.
    args: Options = {}
    # Parameters with their own lr or weight decay: [{match: head, lr_factor: 10, weight_decay: 0}, ...]. `match` is the
    # name of a parameter or of a module around it, where * stands for any text; the first that matches one takes it.
    groups: list[GroupConfig] = []
    # 1d: no weight decay, in any group, of parameters with fewer than two dimensions, which are biases and norms.
    no_decay: Literal["1d"] | None = None
    # Multiply lr by this once for each layer between a parameter and the last layer. A layer is a child of the net, or
    # one of the modules in its nn.Sequential and nn.ModuleList; a norm belongs to the layer before it.
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    # Multiply lr by r = global_batch_size / lr_base_batch_size (linear) or by the square root of r (sqrt).
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    lr_base_batch_size: PositiveInt | None = None  # the global batch size for which lr was chosen

    @model_validator(mode="after")
    def _fits(self) -> OptimizerConfig:
        own = OPTIMIZERS.get(self.name, frozenset({"weight_decay"})) | ({"args"} if self.own_step else set())
        unknown = sorted(self._arguments_set() - own) + (["args"] if self.args and not self.own_step else [])
        if unknown:
            hint = f". Did you mean args.{unknown[0]}?" if self.own_step else ""
            raise ValueError(
                f"{self.name} has no {', '.join(unknown)}. Its settings: lr, {', '.join(sorted(own))}{hint}"
            )
        for key in ("lr", "weight_decay"):
            if key in self.args:
                raise ValueError(f"args.{key}={self.args[key]}: set optimizer.{key} instead")
        if (self.lr_scaling == "none") != (self.lr_base_batch_size is None):
            raise ValueError("lr_scaling (linear or sqrt) and lr_base_batch_size go together; set both or neither")
        return self

    @property
    def own_step(self) -> bool:
        """Whether the optimizer takes its own step, which is known in no other form than the eager one."""
        return self.name == "muon" or ":" in self.name

    @property
    def rounds_to_bf16(self) -> bool:
        """Whether its steps are rounded to bf16, which amplifies the rounding that differs with the division."""
        return "muon" in self.name.lower()

    def _arguments_set(self) -> set[str]:
        return {key for key in set().union(*OPTIMIZERS.values()) if getattr(self, key) is not None}

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that were set, without lr."""
        return {key: getattr(self, key) for key in sorted(self._arguments_set())}

    def scaled_lr(self, global_batch_size: int) -> float:
        """The learning rate after the scaling rule (linear: Goyal et al., arXiv 1706.02677)."""
        ratio = global_batch_size / (self.lr_base_batch_size or global_batch_size)
        factors: dict[str, float] = {"none": 1.0, "linear": ratio, "sqrt": ratio**0.5}
        return self.lr * factors[self.lr_scaling]


# The settings of each schedule besides warmup and final_ratio, which are ignored where they have no meaning.
SCHEDULES: dict[str, frozenset[str]] = {
    "constant": frozenset(),
    "cosine": frozenset(),
    "linear": frozenset(),
    "one_cycle": frozenset(),
    "step": frozenset({"step_size", "milestones", "gamma"}),
    "polynomial": frozenset({"power"}),
    "cosine_restarts": frozenset({"t_0", "t_mult"}),
}


class ScheduleConfig(Section):
    # How lr changes after the warm-up: constant, cosine, linear, one_cycle, step, polynomial, cosine_restarts, or your
    # own function as package.module:function, which returns lr / peak for (step, total), step from 0 to total - 1.
    name: Annotated[str, AfterValidator(_schedule_or_own)] = "constant"
    # Linear rise from 0 to the peak. For one_cycle the length of its rise; there 0 means 30 % of the run.
    warmup: Steps = Duration(0)
    # For cosine, linear, polynomial and cosine_restarts: final learning rate / peak learning rate.
    final_ratio: Fraction = 0.0
    step_size: PositiveSteps | None = None  # for step: multiply lr by gamma each time that this much is trained
    milestones: list[PositiveSteps] | None = None  # for step: multiply lr by gamma here, instead of with step_size
    gamma: Annotated[float, Field(gt=0, lt=1)] | None = None  # for step; None: 0.1
    power: PositiveFloat | None = None  # for polynomial; None: 1, which is linear
    t_0: PositiveSteps | None = None  # for cosine_restarts: length of the first cycle, after the warm-up
    t_mult: PositiveInt | None = None  # for cosine_restarts: length of a cycle / length of the one before; None: 1

    @model_validator(mode="after")
    def _fits(self) -> ScheduleConfig:
        own = SCHEDULES.get(self.name, frozenset())
        unknown = sorted(key for key in set().union(*SCHEDULES.values()) - own if getattr(self, key) is not None)
        if unknown:
            raise ValueError(
                f"{self.name} has no {', '.join(unknown)}. Its settings: {', '.join(sorted(own)) or 'none'}"
            )
        if self.name == "step" and (self.step_size is None) == (not self.milestones):
            raise ValueError("step takes step_size, such as 30 epochs, or milestones, such as [30 epochs, 60 epochs]")
        if self.name == "cosine_restarts" and self.t_0 is None:
            raise ValueError("cosine_restarts needs t_0, the length of the first cycle, such as 10 epochs")
        if ":" in self.name and (self.warmup.value or self.final_ratio):
            raise ValueError(f"{self.name} returns lr / peak at every step: leave out warmup and final_ratio")
        return self


class EarlyStopConfig(Section):
    patience: PositiveInt  # end the run after this many evaluations in a row without an improvement
    min_delta: NonNegativeFloat = 0.0  # a gain must be larger than this to count as an improvement


class DdpConfig(Section):
    find_unused_parameters: bool = False  # set it for a net that does not use all of its weights in every step
    sync_batchnorm: bool = False  # compute BatchNorm statistics over all ranks; GPUs only


class TrackingConfig(Section):
    """Weights & Biases (W&B) and TensorBoard. W&B's environment variables, such as WANDB_PROJECT, take precedence."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online with an API key, else offline
    project: str = "dist_train"  # project, entity, name, group, job_type and tags: of the W&B run
    entity: str | None = None
    name: str | None = None  # None: the name of the run directory
    group: str | None = None  # None: the id of the W&B sweep, if any
    job_type: str = "train"
    tags: list[str] = []
    tensorboard: bool = False  # also write TensorBoard files to the run directory
    pictures: bool = True  # at the end: learning curves, confusion matrix and mistakes, to pictures/ and to W&B
    artifact: bool = False  # upload the weights of the best checkpoint to W&B as an artifact
    timeout_s: Seconds = 60.0  # W&B may take half of this to start, and all of it to upload the rest at the end


_LOSSES: dict[Task, tuple[str, ...]] = {
    "classification": ("cross_entropy",),
    "multi_label": ("bce",),
    "regression": ("mse", "huber"),
}


class Config(Section):
    seed: int = Field(0, ge=0, lt=2**63)  # determines initial weights, data order, dropout and augmentation
    # Length of the training, with its unit: 5 epochs or 600 steps.
    train_for: Annotated[Steps, BeforeValidator(_with_unit)] = Duration(5, "epochs")
    global_batch_size: BatchSize = 64  # examples per optimizer step, over all ranks and micro-steps
    # At most this many examples per forward pass; gradient accumulation does the rest. Lower it to save memory. auto:
    # the most that fits the memory of every rank's device (on a CPU at most 1024); resumes keep what was found.
    per_device_batch_size: Annotated[BatchSize | Literal["auto"], MayChange] = 1024
    # no, or autocast to bf16 or fp16. None: the choice of `accelerate launch`, else no.
    mixed_precision: Annotated[Precision | None, BeforeValidator(_yaml_no)] = None
    # On NVIDIA GPUs: round the factors of float32 matrix products and convolutions to TF32 (a mantissa of 10 bits, not
    # 23), which is faster. None: torch's defaults, which do so for convolutions only.
    tf32: bool | None = None
    # Type of weights and arithmetic. float64 is slow; it tells rounding differences from real ones.
    dtype: Literal["float32", "float64"] = "float32"
    # auto: cuda if there is one, else mps for a single process, else cpu.
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], MayChange] = "auto"
    # How an update runs: eager, compile (torch.compile, on cuda captured too) or graph (CUDA graph), with equal results
    # within rounding.
    # auto: compile, on cuda else graph, if that is supported, faster and soon pays off; else eager.
    step_mode: Annotated[WantedMode, MayChange] = "auto"
    max_grad_norm: PositiveFloat | None = None  # clip the gradient to this global L2 norm; None: no clipping
    # What the net learns. classification: its output is logits [B, K], a target is a class; multi_label: logits [B, K],
    # and 0 or 1 for each of the K labels; regression: numbers [B] or [B, K], as the targets.
    task: Task = "classification"
    # None: that of the net, if it has one, else cross_entropy for classification, bce for multi_label, which take
    # logits, and mse for regression.
    loss: Literal["cross_entropy", "bce", "mse", "huber"] | None = None
    label_smoothing: Fraction = 0.0  # of cross-entropy
    # For cross-entropy, the weight of each class: numbers, or balanced: each class as much as any other. None: all 1.
    class_weights: Literal["balanced"] | list[NonNegativeFloat] | None = None
    ignore_index: int | None = None  # for cross-entropy: leave out examples, or pixels, with this label; None: none
    # Evaluate and save an exponential moving average of the weights with this decay. None: the weights themselves.
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    # Further metrics of each evaluation, by torchmetrics. classification: f1, precision, recall, auroc,
    # average_precision, which are means over the classes, top5 or another number; multi_label: the same five, means
    # over the labels; regression: mae, mse, rmse, r2.
    metrics: Annotated[list[str], MayChange] = []
    best_mode: Literal["max", "min"] | None = None  # which `best_by` is better; None: known of all but a net's own
    # The metric that chooses the best checkpoint and ends the run by `early_stop`, such as val/f1. None: val/accuracy,
    # or val/loss if there is none.
    best_by: Annotated[str | None, Field(validate_default=True)] = None
    early_stop: EarlyStopConfig | None = None  # end the run when evaluations stop improving; None: never
    # Trace these steps with torch.profiler on each rank, to profile/ in the run directory: 20 steps from 100, which are
    # the steps 101 to 120. None: no trace.
    profile: Annotated[StepsFrom | None, MayChange] = None
    log_every: Annotated[Steps, MayChange] = Duration(100)  # log training metrics; 0: only at the end
    eval_every: Steps = Duration(1, "epochs")  # evaluate on the validation split; 0: only at the end
    save_every: Annotated[StepsOrSeconds, MayChange] = Duration(1, "epochs")  # save a checkpoint; 0: only at the end
    keep_last: Annotated[PositiveInt, MayChange] = 2  # keep this many of the newest checkpoints
    keep_best: Annotated[NonNegativeInt, MayChange] = 1  # also keep this many of the best checkpoints
    keep_every: Annotated[Steps, MayChange] = Duration(0)  # also keep checkpoints at multiples of this; 0: none
    # After the first step: end the run if a rank makes no progress, or does not answer the others, for this long.
    stall_timeout_s: Annotated[Seconds, MayChange] = 600.0
    # Until the first step (starting all ranks, restoring a checkpoint, compiling): the same limit.
    setup_timeout_s: Annotated[Seconds, MayChange] = 1800.0
    # Signal by which a scheduler announces a preemption: save, stop, and end as PREEMPTED, to be resumed later.
    preempt_signal: Annotated[Literal["USR1", "USR2"], MayChange] = "USR1"
    final_train_eval: bool = True  # at the end, evaluate the whole training set in eval mode
    # Parent of run directories. None: $DIST_TRAIN_RUNS_DIR, else ./runs.
    runs_dir: Annotated[FilePath | None, MayChange] = None
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    ddp: DdpConfig = DdpConfig()
    tracking: Annotated[TrackingConfig, MayChange] = TrackingConfig()

    @field_validator("loss", "class_weights", "ignore_index", "label_smoothing")
    @classmethod
    def _fits_task(cls, value: object, info: ValidationInfo) -> object:
        name, task = info.field_name or "", info.data.get("task")
        default = cls.model_fields[name].default
        if task is None or value == default:  # no task: it is refused itself
            return value
        loss = value if name == "loss" else "cross_entropy"
        if loss not in _LOSSES[task]:
            other = next(each for each, losses in _LOSSES.items() if loss in losses)
            fix = "" if name == "loss" else f", or {name}={'null' if default is None else f'{default:g}'}"
            raise ValueError(f"it is for task={other}, and this is task={task}. Set task={other}{fix}")
        return value

    @field_validator("class_weights", mode="before")
    @classmethod
    def _are_weights(cls, value: object) -> object:
        numbers = value if isinstance(value, list) else []
        are_fine = all(type(each) in (int, float) and 0 <= each < math.inf for each in numbers) and any(numbers)
        if value not in (None, "balanced") and not are_fine:
            raise ValueError("write balanced, or a list with a number for each class, 0 or more and not all of them 0")
        return value

    @field_validator("metrics")
    @classmethod
    def _of_task(cls, names: list[str], info: ValidationInfo) -> list[str]:
        if task := info.data.get("task"):
            check_metrics(task, names)
        return list(dict.fromkeys(names))

    @field_validator("best_by")
    @classmethod
    def _has_a_direction(cls, value: str | None, info: ValidationInfo) -> str | None:
        mode, name = info.data.get("best_mode"), (value or "").removeprefix("val/")
        if value is None and mode is not None:
            raise ValueError(f"best_mode={mode} needs a metric, such as best_by=val/psnr")
        if value is None:
            return None
        if not name:
            raise ValueError("write the metric of an evaluation, such as val/f1")
        known = direction(name)
        if known is None and mode is None:
            raise ValueError("set best_mode=max if a higher value is better, else best_mode=min")
        if known is not None and mode not in (None, known):
            raise ValueError(f"best_mode={mode}, but the better {name} is the {known}. Leave best_mode out")
        return f"val/{name}"

    @model_validator(mode="after")
    def _trains(self) -> Config:
        if not self.train_for.value:
            raise ValueError(f"train_for={self.train_for} trains nothing; write 5 epochs or 600 steps, for example")
        if self.optimizer.own_step and self.step_mode not in ("auto", "eager"):
            raise ValueError(
                f"step_mode={self.step_mode}: optimizer.name={self.optimizer.name} takes its own step, which is eager. "
                f"Set step_mode=auto"
            )
        return self

    @property
    def best_is(self) -> Literal["max", "min"] | None:
        """Which value of `best_by` is better; None if that is not set."""
        return self.best_mode or direction(self.best_by.removeprefix("val/")) if self.best_by else None

    def flat(self) -> dict[str, Any]:
        """All settings by dotted name: {"optimizer.lr": 0.001, ...}."""
        return dict(_flatten(self.model_dump(mode="json")))

    def result_settings(self) -> dict[str, Any]:
        """The settings of `flat` that can change the result."""
        return {key: value for key, value in self.flat().items() if not _is_free(key)}


def _flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in tree.items():
        nested = isinstance(value, dict) and key != "args"
        pairs += _flatten(value, f"{prefix}{key}.") if nested else [(prefix + key, value)]
    return pairs


def section_of(annotation: Any) -> type[Section] | None:
    """Return the section class inside an annotation such as `EarlyStopConfig | None`; None for a list of them."""
    if get_origin(annotation) is list:
        return None
    candidates = (annotation, *get_args(annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def _is_free(key: str) -> bool:
    section: type[Section] | None = Config
    for part in key.split("."):
        field = section.model_fields.get(part) if section else None
        if field is None:
            return False
        if MayChange in field.metadata:
            return True
        section = section_of(field.annotation)
    return False
