"""Types of settings that several sections have: durations, fractions, paths."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, PlainSerializer

from dist_train.config.durations import Duration
from dist_train.config.profiled_steps import ProfiledSteps
from dist_train.errors import did_you_mean

MayChange = "free"  # may differ between the starts of one run


def _not_seconds(text: object) -> Duration:
    duration = Duration.parse(text)
    if duration.unit == "s":
        raise ValueError("write it in steps or epochs: a time in seconds would fall on another step after a resume")
    return duration


def _not_zero(duration: Duration) -> Duration:
    if not duration.value:
        raise ValueError("it must be longer than zero")
    return duration


def known_or_own(kind: str, name: str, known: Collection[str], others: str) -> str:
    """Return the name of an optimizer or schedule that is known, or may be an object of the user's as module:name.

    Raises:
        ValueError: it is neither. `others`: how names that are not `known` are written.
    """
    if name not in known and not re.fullmatch(r"[\w.]+:\w+", name):
        raise ValueError(f"no such {kind}.{did_you_mean(name, known)} Names: {', '.join(known)}, {others}")
    return name


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
