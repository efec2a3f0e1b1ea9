"""The base of the sections of a config."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """Settings that refuse unknown names, infinities, and a yes or no where a number belongs."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _reject_bool_as_number(cls, value: object, info: ValidationInfo) -> object:
        kinds = _kinds(cls.model_fields[info.field_name or ""].annotation)
        if isinstance(value, bool) and (int in kinds or float in kinds) and bool not in kinds:
            raise ValueError("write a number, not yes or no")  # pydantic would read max_grad_norm: yes as 1.0
        return value


def _kinds(annotation: Any) -> list[Any]:
    """Return the plain types inside an annotation such as `PositiveFloat | None`."""
    inner = get_args(annotation)
    return [kind for part in inner for kind in _kinds(part)] if inner else [annotation]
