"""What the source of a bundle shows without being imported or run: missing classes and methods, with their lines.

Only what is certain is a problem. Where a class, a base or a method comes from elsewhere, by an installed module, a
decorator or a call, nothing is said.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from inspect import Parameter, Signature
from pathlib import Path
from typing import TypeAlias

from dist_train.errors import UserCodeError, did_you_mean
from dist_train.user_code.bundles import locate
from dist_train.user_code.source_names import DEFINITIONS, Bound, Import, Names, Source, read_source

MODEL_FILE, DATASET_FILE = "bks_model.py", "bks_dataset.py"
_MOST_BYTES = 4 * 2**20  # of a file; a larger one is not read


@dataclass(frozen=True)
class SourceCheck:
    summary: str = ""  # what was found: "UserModel: loss, metrics"
    problems: tuple[str, ...] = ()  # one line each: "bks_model.py:31 UserModel has no method loss(output, target). ..."


def check_source(folder: Path, filename: str) -> SourceCheck:
    """Read `filename`, MODEL_FILE or DATASET_FILE, in the folder of a bundle, and the files that it imports from there.

    Nothing is imported or run.
    """
    try:
        file = locate(folder, filename)
        bundle = _Bundle(file.parent)
        source = bundle.source(file)
    except UserCodeError as error:
        return SourceCheck(problems=(str(error),))
    if source is None:
        return SourceCheck(problems=tuple(bundle.problems))
    summary = bundle.check_model(source) if filename == MODEL_FILE else bundle.check_datasets(source)
    bundle.check_imports(source)
    return SourceCheck(summary, tuple(dict.fromkeys(bundle.problems)))


# --- classes and what is known of them -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Class:
    source: Source
    node: ast.ClassDef

    @property
    def where(self) -> str:
        return f"{self.source.file}:{self.node.lineno} {self.node.name}"


@dataclass(frozen=True)
class _Attribute:
    source: Source
    value: Bound


class _Not(Enum):
    MISSING = "missing"
    OPEN = "open"  # it may be there or not, or comes from elsewhere


_Resolved: TypeAlias = "_Class | Source | str | _Not"  # str: the full name of what is not part of the bundle

_MODULE = "torch.nn."
_DATA = ("torch.utils.data.", "torchvision.datasets.")
_PLAIN = {"object", "abc.ABC", "typing.Generic", "typing.Protocol"}
_ABSTRACT_DATASET = {"torch.utils.data.Dataset", "torch.utils.data.dataset.Dataset"}
_ITERABLE = {"torch.utils.data.IterableDataset", "torch.utils.data.dataset.IterableDataset"}
_DEEPEST = 50  # aliases, imports and bases that are followed


def _has(external: str, attribute: str) -> bool | None:
    """Whether a class of another package has an attribute; None if that is not known."""
    if external in _PLAIN:
        return False
    if external.startswith(_MODULE):
        return attribute == "forward" and external != "torch.nn.Module"
    if external in _ABSTRACT_DATASET | _ITERABLE:
        return False
    if external.startswith(_DATA):
        return attribute != "collate"
    return None


class _Bundle:
    """The files of a bundle that were read, and what is wrong with them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sources: dict[Path, Source | None] = {}
        self._derived: dict[tuple[ast.ClassDef, str], bool | None] = {}
        self._looked_up: dict[tuple[ast.ClassDef, str], _Attribute | _Not] = {}
        self.problems: list[str] = []

    def source(self, path: Path) -> Source | None:
        """Return a file of the bundle; None if it is not Python, which is a problem, or too large."""
        if path not in self._sources:
            self._sources[path] = None  # also while it is read: imports may form a circle
            try:
                if path.stat().st_size <= _MOST_BYTES:
                    self._sources[path] = read_source(path)
            except SyntaxError as error:
                self.problems.append(f"{path.name}:{error.lineno} {type(error).__name__}: {error.msg}")
            except (ValueError, RecursionError, MemoryError, OSError) as error:
                self.problems.append(f"{path.name} cannot be read: {error or type(error).__name__}")
        return self._sources[path]

    # --- the interface ---

    def check_model(self, source: Source) -> str:
        """Find what is wrong with UserModel, as models.bundle would. Returns what was found."""
        cls = self._class(source, "UserModel")
        if cls is None:
            return ""
        if self._derives(cls, _MODULE) is False:
            self.problems.append(f"{cls.where} is not a torch.nn.Module. Derive it from that class.")
        elif self._look_up(cls, "forward") is self._look_up(cls, "__call__") is _Not.MISSING:
            self._check_method(cls, "forward", "input")
        self._check_method(cls, "loss", "output", "target")
        if self._look_up(cls, "metrics") is not _Not.MISSING:
            self._check_method(cls, "metrics", "output", "target")
        methods = [name for name in ("loss", "metrics") if isinstance(self._look_up(cls, name), _Attribute)]
        return f"{cls.node.name}{': ' if methods else ''}{', '.join(methods)}"

    def check_datasets(self, source: Source) -> str:
        """Find what is wrong with UserDataset and UserValDataset, as data.sets.bundle would. Returns what was found."""
        names = ["UserDataset", *(["UserValDataset"] if "UserValDataset" in source.names.bound else [])]
        classes = [cls for name in names if (cls := self._class(source, name)) is not None]
        for cls in classes:
            if any(self._derives(cls, name) for name in _ITERABLE):
                self.problems.append(
                    f"{cls.where} is an IterableDataset. Make it a Dataset with __len__ and __getitem__."
                )
                continue
            for name in ("__len__", "__getitem__"):
                if self._look_up(cls, name) is _Not.MISSING:
                    self.problems.append(f"{cls.where} has no method {name}. Exact sharding and resume need it.")
            self._check_method(cls, "collate", "batch")
            if self._look_up(cls, "__new__") is _Not.MISSING:
                self._check_method(cls, "__init__", "data_path")
        return ", ".join(cls.node.name for cls in classes)

    def check_imports(self, source: Source) -> None:
        """Find what is wrong with the files of the bundle that a file imports, and with the names that it takes."""
        for bound in (*source.names.bound.values(), *source.names.stars):
            if isinstance(bound, Import) and not bound.conditional:
                file, before = self._module_file(source, bound.module), len(self._sources)
                self._imported(source, bound)
                if file and len(self._sources) > before and (module := self.source(file)):
                    self.check_imports(module)

    def _class(self, source: Source, name: str) -> _Class | None:
        """Return a class by its name; None if it is missing, which is a problem, or cannot be followed."""
        found = self._named(source, name)
        if found is _Not.MISSING:
            own = {
                key: node for key, node in source.names.bound.items() if isinstance(node, DEFINITIONS) and key[0] != "_"
            }
            listed = ", ".join(f"{key} (line {node.lineno})" for key, node in own.items()) or "nothing"
            near = did_you_mean(name, own)
            self.problems.append(f"{source.file}: class {name} is missing. Found: {listed}.{near}")
        return found if isinstance(found, _Class) else None

    def _check_method(self, cls: _Class, name: str, *arguments: str) -> None:
        """Find whether a class has a method that takes these positional arguments."""
        found, form = self._look_up(cls, name), f"{name}({', '.join(arguments)})"
        value = found.value if isinstance(found, _Attribute) else None
        if found is _Not.MISSING or isinstance(value, ast.Constant):
            own = [key for key, node in _body(cls).bound.items() if isinstance(node, DEFINITIONS) and key[0] != "_"]
            self.problems.append(f"{cls.where} has no method {form}.{did_you_mean(name, own)}")
        if not isinstance(found, _Attribute) or not isinstance(value, ast.FunctionDef):
            return
        decorators = {ast.unparse(each) for each in value.decorator_list}
        if decorators - {"staticmethod", "classmethod"}:
            return  # another decorator may change what it takes
        try:
            _signature(value.args).bind(*(() if "staticmethod" in decorators else ("self",)), *arguments)
        except TypeError as error:
            where = f"{found.source.file}:{value.lineno} {cls.node.name}.{name}"
            self.problems.append(f"{where} cannot be called as {form}: {error}.")

    # --- following names ---

    def _look_up(self, cls: _Class, name: str, depth: int = 0) -> _Attribute | _Not:
        """Find an attribute in a class and its bases."""
        if (cls.node, name) not in self._looked_up:
            self._looked_up[cls.node, name] = _Not.OPEN  # also while it is looked up: bases may form a circle
            self._looked_up[cls.node, name] = self._search(cls, name, depth)
        return self._looked_up[cls.node, name]

    def _search(self, cls: _Class, name: str, depth: int) -> _Attribute | _Not:
        body = _body(cls).bound
        if (cls.node.name, name) in cls.source.attached:
            return _Not.OPEN
        if name in body:
            return _Attribute(cls.source, body[name])
        if cls.node.decorator_list or cls.node.keywords or cls.source.is_open or depth > _DEEPEST:
            return _Not.OPEN
        for base in self._bases(cls):
            if isinstance(base, _Class):
                found = self._look_up(base, name, depth + 1)
                if found is not _Not.MISSING:
                    return found
            elif not isinstance(base, str) or _has(base, name) is not False:
                return _Not.OPEN
        return _Not.MISSING

    def _derives(self, cls: _Class, prefix: str, depth: int = 0) -> bool | None:
        """Whether a class derives from one whose full name begins with `prefix`; None if that is not known."""
        if (cls.node, prefix) not in self._derived:
            self._derived[cls.node, prefix] = None  # also while it is looked up: bases may form a circle
            known: list[bool | None] = [False]
            for base in self._bases(cls):
                if isinstance(base, _Class):
                    known.append(self._derives(base, prefix, depth + 1) if depth < _DEEPEST else None)
                elif isinstance(base, str):
                    known.append(base.startswith(prefix) or (None if _has(base, "") is None else False))
                else:
                    known.append(None)
            self._derived[cls.node, prefix] = True if True in known else None if None in known else False
        return self._derived[cls.node, prefix]

    def _bases(self, cls: _Class) -> Iterator[_Resolved]:
        return (self._expression(cls.source, base) for base in cls.node.bases)

    def _named(self, source: Source, name: str, depth: int = 0) -> _Resolved:
        """Find what a name at the top of a file is."""
        if depth > _DEEPEST:
            return _Not.OPEN
        if name in source.names.bound:
            match source.names.bound[name]:
                case ast.ClassDef() as node:
                    return _Class(source, node)
                case Import() as found:
                    return self._imported(source, found, depth + 1)
                case ast.Name() | ast.Attribute() | ast.Subscript() as alias:
                    return self._expression(source, alias, depth + 1)
            return _Not.OPEN
        for star in source.names.stars:
            module = self._imported(source, star, depth + 1)
            inside = self._named(module, name, depth + 1) if isinstance(module, Source) else _Not.OPEN
            if inside is not _Not.MISSING:
                return inside
        return _Not.OPEN if source.is_open else _Not.MISSING

    def _expression(self, source: Source, node: ast.expr, depth: int = 0) -> _Resolved:
        """Find what an expression such as `nn.Module`, `Net` or `Dataset[int]` is."""
        match node:
            case ast.Name():
                found = self._named(source, node.id, depth)
                return node.id if found is _Not.MISSING else found  # a builtin
            case ast.Subscript():
                return self._expression(source, node.value, depth)
            case ast.Attribute():
                owner = self._expression(source, node.value, depth)
                if isinstance(owner, str):
                    return f"{owner}.{node.attr}"
                if isinstance(owner, Source):
                    found = self._named(owner, node.attr, depth)
                    return _Not.OPEN if found is _Not.MISSING else found  # it may be a submodule
        return _Not.OPEN

    def _imported(self, source: Source, what: Import, depth: int = 0) -> _Resolved:
        """Find what an import binds."""
        file = self._module_file(source, what.module)
        if file is None:
            return f"{what.module}.{what.name}" if what.name else what.module
        module = self.source(file)
        if module is None or what.name is None:
            return module or _Not.OPEN
        found = self._named(module, what.name, depth)
        if found is _Not.MISSING:
            if not what.conditional and self._module_file(source, f"{what.module}.{what.name}") is None:
                near = did_you_mean(what.name, module.names.bound)
                self.problems.append(f"{source.file}:{what.line} {module.file} has no {what.name}.{near}")
            return _Not.OPEN
        return found

    def _module_file(self, source: Source, module: str) -> Path | None:
        """Return the file of a module that is part of the bundle."""
        name = module.lstrip(".")
        level = len(module) - len(name)
        if level > len(source.path.parents):
            return None
        folder = [source.path, *source.path.parents][level] if level else self._folder
        path = folder.joinpath(*name.split("."))
        files = (path / "__init__.py", path.with_name(f"{path.name}.py"))
        return next((file for file in files if file.is_file()), None)


def _body(cls: _Class) -> Names:
    return Names().visit(cls.node.body)


def _signature(arguments: ast.arguments) -> Signature:
    positional = [*arguments.posonlyargs, *arguments.args]
    first_default = len(positional) - len(arguments.defaults)
    parameters = [
        Parameter(
            argument.arg,
            Parameter.POSITIONAL_ONLY if number < len(arguments.posonlyargs) else Parameter.POSITIONAL_OR_KEYWORD,
            default=None if number >= first_default else Parameter.empty,
        )
        for number, argument in enumerate(positional)
    ]
    if arguments.vararg:
        parameters.append(Parameter(arguments.vararg.arg, Parameter.VAR_POSITIONAL))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parameters.append(
            Parameter(argument.arg, Parameter.KEYWORD_ONLY, default=Parameter.empty if default is None else None)
        )
    if arguments.kwarg:
        parameters.append(Parameter(arguments.kwarg.arg, Parameter.VAR_KEYWORD))
    return Signature(parameters)
