"""What the small JSON files of a run hold, and one reader for them: what is damaged is named and left out."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # Python's own will do from 3.12 on

from dist_train.atomic_files import parse_object
from dist_train.config.schema import Precision, StepMode

State = Literal[
    "CREATED", "STARTING", "SETUP", "TRAINING", "EVALUATING", "EVALUATED", "SAVING",
    "FINISHED", "INTERRUPT", "PREEMPTED", "ERROR",
]  # fmt: skip
Count = Annotated[int, Field(ge=0, lt=2**53)]
Number = Annotated[float, Field(allow_inf_nan=False)]
JobId = Annotated[str, Field(pattern=r"^[0-9]+(_[0-9]+)?$")]  # of an array with the member

_log = logging.getLogger(__name__)
_named: set[Path] = set()  # damaged files


class Status(TypedDict, total=False):
    """status.json, of the newest attempt."""

    state: State
    attempt: Count
    step: Count
    total_steps: Count
    epoch: Number
    reached: Count  # the furthest step of any attempt
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
    metrics: dict[str, Number | None]  # of each the newest


class DataFacts(TypedDict):
    in_channels: Count | None
    num_classes: Count | None
    image_size: Count | None
    classes: list[str] | None
    pixels: bool


class Sketch(TypedDict):
    """What an example holds."""

    exact: str
    floats: list[Annotated[list[Number], Field(min_length=1)]]  # of each array


class SplitIdentity(TypedDict):
    """What the examples of a split are."""

    count: Count
    labels: NotRequired[str]  # this and the next two: checksums
    names: NotRequired[str]
    pixels: NotRequired[str]
    examples: NotRequired[dict[str, Sketch]]  # by their indices
    unsteady: NotRequired[Count]  # the index of one that is another each time


class Provenance(TypedDict, total=False):
    """run.json, of the newest attempt that came to train."""

    attempt: Count
    wandb_id: Annotated[str, Field(min_length=1)]
    world_size: Count
    num_nodes: Count
    num_threads: Count
    device: str
    cpu: str
    mixed_precision: Precision
    step_mode: StepMode
    versions: dict[str, str | None]
    batch_plan: dict[str, Count]
    data: DataFacts
    data_identity: dict[str, SplitIdentity]


class Error(TypedDict, total=False):
    """error.json, of the rank that failed first."""

    rank: Count
    host: str
    kind: str
    message: str
    exit_code: Annotated[int, Field(ge=1, le=255)]


# result.json
Result = TypedDict("Result", {"train_s": Number, "samples_per_s": Number | None, "test/accuracy": Number}, total=False)


class Submission(TypedDict, total=False):
    """slurm.json"""

    job: JobId
    log: str
    submitted: Number  # time.time()


def read_record(path: Path, kind: Any) -> dict[str, Any]:
    """What a file of one of these kinds says; {} where there is none.

    An entry of another type is left out, and the file named once. Any entry may be missing, and what is not known here
    passes as it is.
    """
    found: dict[str, Any] = {}
    wrong: dict[str, Any] = {}
    try:
        found = parse_object(path.read_bytes())
        _validator(kind).validate_python(found, strict=True)
    except OSError:
        return {}
    except ValidationError as error:
        wrong = {str(item["loc"][0]): found[str(item["loc"][0])] for item in error.errors()}
        _name(path, ", ".join(f"{name}={value!r}" for name, value in wrong.items()))
    except ValueError as error:
        _name(path, str(error))
    return {name: value for name, value in found.items() if name not in wrong}


@cache
def _validator(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _name(path: Path, what: str) -> None:
    if path not in _named:
        _log.warning("%s is damaged: %s. Going on without that.", path, what if len(what) < 200 else f"{what[:200]}...")
    _named.add(path)
