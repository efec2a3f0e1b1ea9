"""The settings as a Markdown page, rendered from the schema: names, types, defaults and the comments beside them."""

from __future__ import annotations

import ast
import inspect
import io
import json
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType, NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dist_train.config import augment, data, optimizer, schedule, schema, values
from dist_train.config.durations import Duration
from dist_train.config.profiled_steps import ProfiledSteps

_HEAD = """\
# Settings

Generated from [dist_train/config/](../dist_train/config/) by `dist-train config reference`.

A run is one YAML file. `-o name=value` changes a setting and wins over the file; the file wins over the defaults. An
unknown name is refused with the nearest legal one, a wrong value with what is allowed, before any process starts.

```bash
dist-train config ls                                  # the bundled configs; their headers say what was measured
dist-train config show -c mnist -o optimizer.lr=3e-3  # all settings of a run, defaults included
dist-train config diff mnist mnist_mlp                # the settings in which two configs or runs differ
dist-train train -c mnist -o train_for="2 epochs" --dry-run
```

A duration is a number with a unit: `600 steps`, `0.5 epochs`, `30 s`. A number without a unit means steps, but
`train_for` needs one. A list is written `[0.9, 0.999]`, a mapping `{dropout: 0.1}`; `model.args.dropout=0.1` sets one
entry.

"Resume" says whether another value is accepted when a run is resumed. A `no` stands for settings that change the
result: the resume is refused, with both values. "None:" in a meaning says what holds while the setting is not set.
"""
_STEPS = get_args(values.Steps)[1]  # the validator that refuses seconds
_WORDS = {str: "text", bool: "`true` or `false`", int: "integer", float: "number", Path: "path",
          ProfiledSteps: "N steps from STEP"}  # fmt: skip


def to_markdown() -> str:
    """All settings, one table for each section."""
    tables = {"": _HEAD} | {name: f"\n## {name}\n" for name in _sections(schema.Config)}
    columns = "\n| setting | type | default | resume | meaning |\n| --- | --- | --- | --- | --- |\n"
    comments = _comments()
    rows: dict[str, list[str]] = {name: [] for name in tables}
    for name, owner, field, free in _walk(schema.Config):
        comment = comments.get((owner, name.rpartition(".")[2]), "").replace("|", r"\|")
        cells = [
            f"`{name}`",
            _type(field.annotation, field.metadata),
            _default(field),
            "yes" if free else "no",
            comment,
        ]
        section = next((each for each in tables if each and f"{name}.".startswith(f"{each}.")), "")
        rows[section].append(f"| {' | '.join(cells)} |".replace("|  |", "| |") + "\n")
    return "".join(title + columns + "".join(rows[name]) for name, title in tables.items())


def _sections(model: type[BaseModel]) -> Iterator[str]:
    yield from (name for name, field in model.model_fields.items() if schema.section_of(field.annotation))


def _walk(model: type[BaseModel], prefix: str = "", free: bool = False) -> Iterator[tuple[str, str, FieldInfo, bool]]:
    """Dotted name, class, field and whether a resume may change it, of each setting and each optional section."""
    for name, field in model.model_fields.items():
        section = schema.section_of(field.annotation)
        free_here = free or values.MayChange in field.metadata
        if section is None or (not field.is_required() and field.default is None):
            yield prefix + name, model.__name__, field, free_here
        if section is not None:
            yield from _walk(section, f"{prefix}{name}.", free_here)


def _type(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """What a user may write: "integer > 0", "`cpu`, `cuda`"."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inner[0], inner[1:])
    if origin is Literal:
        return ", ".join(f"`{json.dumps(value) if isinstance(value, bool) else value}`" for value in inner)
    if origin is list:
        if entries := schema.section_of(inner[0]):
            return f"[{{{', '.join(entries.model_fields)}}}, ...]"
        return f"[{_type(inner[0])}, ...]"
    if origin is tuple:
        return f"[{', '.join(map(_type, inner))}]"
    if origin is dict:
        return "mapping"
    if inner:  # a union
        return " or ".join(_type(each, metadata) for each in inner if each is not NoneType)
    if annotation is Duration:
        return "steps or epochs" if _STEPS in metadata else "steps, epochs or seconds"
    if schema.section_of(annotation):
        return "section"
    bounds = [bound for item in metadata for bound in getattr(item, "metadata", [item])]
    return _WORDS[annotation] + ",".join(text for bound in bounds if (text := _limit(bound)))


def _limit(bound: object) -> str:
    for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤")):
        limit = getattr(bound, name, None)
        if limit is not None:
            return f" {sign} 2^{limit.bit_length() - 1}" if limit >= 2**31 else f" {sign} {limit}"
    return ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is None:
        return "not set"
    plain = isinstance(field.default, str | Duration)
    return f"`{field.default if plain else json.dumps(field.default)}`"


def _comments() -> dict[tuple[str, str], str]:
    """The comments of each field by class and name: those above it, then the one beside it."""
    found: dict[tuple[str, str], str] = {}
    for module in (schema, data, augment, optimizer, schedule):
        found |= _comments_in(module)
    return found


def _comments_in(module: ModuleType) -> dict[tuple[str, str], str]:
    source = inspect.getsource(module)
    alone: dict[int, str] = {}
    beside: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            place = beside if token.line[: token.start[1]].strip() else alone
            place[token.start[0]] = token.string.lstrip("# ")
    found = {}
    for owner in (each for each in ast.parse(source).body if isinstance(each, ast.ClassDef)):
        for field in owner.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                first = field.lineno
                while first - 1 in alone:
                    first -= 1
                lines = [alone[line] for line in range(first, field.lineno)] + [beside.get(field.end_lineno or 0, "")]
                found[owner.name, field.target.id] = " ".join(lines).strip()
    return found
