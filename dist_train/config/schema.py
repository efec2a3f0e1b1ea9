"""Every setting with its type, default and meaning; the larger sections are in modules of their own beside this one.

One config file describes one run. Defaults are defined only here. A setting marked `MayChange` may have another value
when a run resumes, because that cannot change the result; all others must stay the same.
"""

from __future__ import annotations

import logging
import math
import re
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from dist_train.config.data import DataConfig
from dist_train.config.durations import Duration
from dist_train.config.metric_names import Task, check_metrics, direction
from dist_train.config.optimizer import OptimizerConfig
from dist_train.config.schedule import ScheduleConfig
from dist_train.config.section import Section
from dist_train.config.values import (
    BatchSize,
    FilePath,
    Fraction,
    MayChange,
    Options,
    PositiveSteps,
    Seconds,
    Steps,
    StepsFrom,
    StepsOrSeconds,
)

_log = logging.getLogger(__name__)

Precision = Literal["no", "bf16", "fp16"]
StepMode = Literal["eager", "compile", "graph"]
WantedMode = Literal["auto", StepMode]


def _with_unit(text: object) -> object:
    number = str(text).strip()
    if re.fullmatch(r"[\d.]+", number):
        raise ValueError(f"{number} epochs or {number} steps? Write the unit")
    return text


def _yaml_no(value: object) -> object:
    return "no" if value is False else value  # YAML reads a bare `no` as False


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
        if self.data.tta is not None and (self.task != "classification" or self.ignore_index is not None):
            needs = "task=classification" if self.task != "classification" else "every label, without ignore_index"
            raise ValueError(f"data.tta={self.data.tta} counts correct classes: it needs {needs}. Remove data.tta")
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
