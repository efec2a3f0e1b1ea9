"""The names that a Python file binds, read from its syntax tree: nothing is imported or run."""

from __future__ import annotations

import ast
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from dist_train.errors import ConfigError

DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_BINDING_CALLS = {"exec", "eval", "globals", "locals", "vars", "__import__"}  # may bind any name


@dataclass(frozen=True)
class Import:
    module: str  # dotted; with as many dots before it as a relative import has
    name: str | None  # of the module; None: the module itself
    line: int
    conditional: bool  # it may be meant to fail


Bound: TypeAlias = "ast.expr | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | Import | None"


@dataclass
class Names:
    """The names that a module or a class body binds. None: in a way that is not followed."""

    bound: dict[str, Bound] = field(default_factory=dict)
    stars: list[Import] = field(default_factory=list)

    def visit(self, body: Sequence[ast.stmt], conditional: bool = False) -> Names:
        for node in body:
            match node:
                case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                    self._bind(node.name, node, conditional)
                case ast.Import():
                    for alias in node.names:
                        module = alias.name if alias.asname else alias.name.partition(".")[0]
                        self._bind(alias.asname or module, Import(module, None, node.lineno, conditional), conditional)
                case ast.ImportFrom():
                    module = "." * node.level + (node.module or "")
                    for alias in node.names:
                        if alias.name == "*":
                            self.stars.append(Import(module, None, node.lineno, conditional))
                        else:
                            found = Import(module, alias.name, node.lineno, conditional)
                            self._bind(alias.asname or alias.name, found, conditional)
                case ast.Assign():
                    for target in node.targets:
                        self._assign(target, node.value, conditional)
                case ast.AnnAssign(value=ast.expr() as value):
                    self._assign(node.target, value, conditional)
                case _:
                    for name in _stored(node):
                        self._bind(name, None, conditional)
            for inner in _bodies(node):
                self.visit(inner, conditional=True)
        return self

    def _bind(self, name: str, value: Bound, conditional: bool) -> None:
        self.bound[name] = None if conditional and name in self.bound else value

    def _assign(self, target: ast.expr, value: ast.expr, conditional: bool) -> None:
        match target:
            case ast.Name():
                self._bind(target.id, value, conditional)
            case _:
                for name in _stored(target):
                    self._bind(name, None, conditional)


def _stored(node: ast.AST) -> Iterator[str]:
    """Yield the names that a node binds, outside the blocks that it holds."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del)):
        yield node.id
    if not isinstance(node, ast.Lambda):
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case)):
                yield from _stored(child)


def _bodies(node: ast.stmt) -> Iterator[list[ast.stmt]]:
    """Yield the blocks of an `if`, `try`, `for`, `with` or `match`."""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return
    for part in ("body", "orelse", "finalbody"):
        yield getattr(node, part, [])
    for part in (*getattr(node, "handlers", []), *getattr(node, "cases", [])):
        yield part.body


@dataclass(frozen=True)
class Source:
    """One file of a bundle."""

    path: Path
    names: Names
    attached: set[tuple[str, str]]  # (name, attribute) of each `name.attribute = value`
    is_open: bool  # it may bind names that its source does not show

    @property
    def file(self) -> str:
        return self.path.name


def read_source(path: Path) -> Source:
    """Raises SyntaxError or ValueError if it is not Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(path.read_bytes(), str(path))
    names, attached = Names().visit(tree.body), set()
    is_open = "__getattr__" in {getattr(node, "name", "") for node in tree.body}
    for node in ast.walk(tree):
        match node:
            case ast.Global():
                names.bound |= dict.fromkeys(node.names)
            case ast.Attribute(value=ast.Name(id=owner), attr=attribute, ctx=ast.Store()):
                attached.add((owner, attribute))
            case ast.Call(func=ast.Name(id=called)):
                into_self = isinstance(node.args[0], ast.Name) and node.args[0].id == "self" if node.args else False
                is_open |= called in _BINDING_CALLS or (called == "setattr" and not into_self)
    return Source(path, names, attached, is_open)


def check_class_is_named(setting: str, name: str) -> None:
    """Raise ConfigError if `name`, without a colon, is that of a Python file in the current folder."""
    module = name.removesuffix(".py")
    if os.path.isfile(f"{module}.py"):  # noqa: PTH113 - a Path may raise
        raise ConfigError(f"{setting}={name}: name the class in {module}.py too, {setting}={module}:NAME.")
