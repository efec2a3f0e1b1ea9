"""Schemas of a run's small JSON files, and one reader for them, which reports damaged entries and drops them."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic accepts typing.TypedDict from Python 3.12 on

from dist_train.atomic_files import parse_object, read_regular
from dist_train.config.schema import Precision, StepMode

State = Literal[
    "CREATED", "STARTING", "SETUP", "TRAINING", "EVALUATING", "EVALUATED", "SAVING",
    "FINISHED", "INTERRUPT", "PREEMPTED", "ERROR",
]  # fmt: skip
Count = Annotated[int, Field(ge=0, lt=2**53)]
Number = Annotated[float, Field(allow_inf_nan=False)]
JobId = Annotated[str, Field(pattern=r"^[0-9]{1,18}(_[0-9]+)?$")]  # job, or array job and task

_log = logging.getLogger(__name__)
_reported: set[Path] = set()  # damaged files


class Status(TypedDict, total=False):
    """status.json, written by the newest attempt."""

    state: State
    attempt: Count
    step: Count
    total_steps: Count
    epoch: Number
    reached: Count  # the highest step of any attempt
    resumed_at: Count
    fruitless_starts: Count
    world_size: Count
    heartbeat: Number  # time.time()
    host: str
    pid: Annotated[int, Field(ge=1, lt=2**31)]
    slurm_job_id: JobId | None
    slurm_restart_count: Annotated[str, Field(pattern=r"^[0-9]*$")] | None
    wandb_id: Annotated[str, Field(min_length=1)]
    seconds: dict[str, Number]  # by use, over all attempts
    data_wait_s: Number
    save_s: Number
    best: dict[str, Number]
    metrics: dict[str, Number | None]  # the newest value of each


class DataFacts(TypedDict):
    in_channels: Count | None
    num_classes: Count | None
    image_size: Count | None
    classes: list[str] | None
    pixels: bool


class Sketch(TypedDict):
    """Fingerprint of one example."""

    exact: str
    floats: list[Annotated[list[Number], Field(min_length=1)]]  # one list for each array


class SplitFingerprint(TypedDict):
    """Fingerprint of the examples of a split."""

    count: Count
    labels: NotRequired[str]  # this and the next two: checksums
    names: NotRequired[str]
    pixels: NotRequired[str]
    resized_by: NotRequired[str]  # of pictures in a folder
    examples: NotRequired[dict[str, Sketch]]  # by index
    unsteady: NotRequired[Count]  # the index of an example that differs at each read


class InitialWeights(TypedDict):
    path: str
    sha256: str
    left_out: list[str]  # tensors of the net


class Extension(TypedDict):
    time: Annotated[float, Field(ge=0, lt=2**35)]  # time.time()
    step: Count  # from which on it holds
    settings: dict[str, Annotated[list[str], Field(min_length=2, max_length=2)]]  # old and new value, as YAML


class Provenance(TypedDict, total=False):
    """run.json, written by the newest attempt that reached training; before the first checkpoint by each attempt."""

    attempt: Count
    wandb_id: Annotated[str, Field(min_length=1)]
    world_size: Count
    num_nodes: Count
    hosts: list[str]
    num_threads: Count
    exchange: str  # what adds the gradients of the ranks
    device: str
    cpu: str
    mixed_precision: Precision
    step_mode: StepMode
    channels_last: bool
    versions: dict[str, str | None]
    batch_plan: dict[str, Count]
    argv: list[str]
    cwd: str
    python: str
    environment: dict[str, str]  # a named list of variables, see process_info.py
    init_from: str | None  # a run directory
    initial_weights: InitialWeights  # of `model.weights`
    extensions: list[Extension]
    data: DataFacts
    data_identity: dict[str, SplitFingerprint]


class Error(TypedDict, total=False):
    """error.json, written by the rank that failed first."""

    rank: Count
    host: str
    kind: str
    message: str
    traceback: str
    exit_code: Annotated[int, Field(ge=1, le=255)]


# result.json
_ByClass = dict[str, Number | None]
Result = TypedDict(
    "Result",
    {"train_s": Number, "samples_per_s": Number | None, "test/accuracy": Number, "test/accuracy_by_class": _ByClass,
     "val/accuracy_by_class": _ByClass},
    total=False,
)  # fmt: skip


class Layer(TypedDict):
    """A row of the table of the net's layers."""

    name: str
    type: str
    output: str
    parameters: Count


class Layers(TypedDict, total=False):
    """layers.json, written when training begins."""

    layers: list[Layer]


class Submission(TypedDict, total=False):
    """slurm.json, written by `slurm submit`."""

    job: JobId
    log: str
    cwd: str
    options: list[str]  # of `slurm submit`
    submitted: Number  # time.time()


class QueuedJob(TypedDict, total=False):
    """job.json, written when a job is created, and again when it is queued and when it is begun."""

    nproc: Annotated[int, Field(ge=1, lt=2**31)]
    cwd: str
    python: str
    environment: dict[str, str]  # as in run.json
    number: Count  # in the queue; absent while it is not queued
    host: str  # whose keeper begins it
    begun: Number  # time.time() when a keeper did
    gpus: list[str]  # that the keeper gave it


def read_record(path: Path, kind: Any) -> dict[str, Any]:
    """Read a file with one of these schemas. Return {} if it does not exist.

    Entries of the wrong type are dropped, and the file is reported once. Any entry may be missing, and unknown entries
    pass unchanged.
    """
    entries: dict[str, Any] = {}
    wrong: dict[str, Any] = {}
    try:
        entries = parse_object(read_regular(path))
        _validator(kind).validate_python(entries, strict=True)
    except OSError:
        return {}
    except ValidationError as error:
        wrong = {str(item["loc"][0]): entries[str(item["loc"][0])] for item in error.errors()}
        _report_damage(path, ", ".join(f"{name}={value!r}" for name, value in wrong.items()))
    except ValueError as error:
        _report_damage(path, str(error))
    return {name: value for name, value in entries.items() if name not in wrong}


@cache
def _validator(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _report_damage(path: Path, what: str) -> None:
    if path not in _reported:
        _log.warning(
            "%s is damaged: %s. Continuing without that part.", path, what if len(what) < 200 else f"{what[:200]}..."
        )
    _reported.add(path)
