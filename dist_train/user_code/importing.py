"""Import of user code, by `package.module:Name` or by file. Errors name the user's file and line."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from dist_train.errors import ConfigError, DistTrainError, UserCodeError, did_you_mean
from dist_train.torchvision_compat import import_torchvision, is_missing_operator
from dist_train.user_code.source_names import read_source

_MOST_NAMES = 8  # that an error lists


def load_object(spec: str) -> Any:
    """Import the object `package.module:Name`. The current folder comes first on the search path.

    Raises:
        ConfigError: `spec` does not have this form.
        UserCodeError: the module or name does not exist, or the import fails.
    """
    module_name, name, source = _look_up(spec)
    with wrap_user_errors(spec, "cannot be imported"):
        try:
            module = _import(lambda: importlib.import_module(module_name), source)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise  # the module exists, but a module that it imports does not
            raise UserCodeError(_missing_module(spec, module_name, error.name)) from None
    if hasattr(module, name):
        return getattr(module, name)
    raise UserCodeError(
        f"{spec}: {getattr(module, '__file__', None) or module_name} has no {name}. {list_names(module, name)}"
    )


def check_object(spec: str) -> None:
    """Check that `load_object` would succeed. The module is executed only if its source does not show the name.

    Raises:
        ConfigError, UserCodeError: as `load_object`.
    """
    _module_name, name, source = _look_up(spec)
    if source is None or not defines(source, name):
        load_object(spec)


def check_object_source(setting: str, spec: str) -> None:
    """Check `package.module:Name` without importing anything. What only an import could tell is accepted.

    Raises:
        ConfigError: `spec` does not have this form.
        UserCodeError: there is no such module, or its source shows no such name.
    """
    module_name, name, source = _look_up(spec)
    top = module_name.partition(".")[0]
    if source is None:
        if top not in sys.modules and importlib.util.find_spec(top) is None:
            raise UserCodeError(f"{setting}={_missing_module(spec, module_name, top)}")
        return
    if source.suffix != ".py":
        return
    try:
        found = read_source(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise user_code_error(f"{setting}={spec} cannot be imported", error) from None
    if name not in found.names.bound and not found.names.stars and not found.is_open:
        raise UserCodeError(f"{setting}={spec}: {source} has no {name}.{did_you_mean(name, found.names.bound)}")


def defines(source: Path, name: str) -> bool:
    """Return whether the source of a Python file shows a top-level class, function or value of this name."""
    try:
        tree = ast.parse(source.read_bytes())
    except (OSError, SyntaxError, ValueError):  # missing, or not Python
        return False
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else ()
        if name in (getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)):
            return True
    return False


def _look_up(spec: str) -> tuple[str, str, Path | None]:
    """Split `package.module:Name`. Returns module, name, and the module's file if it is known without an import."""
    module_name, _, name = spec.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), name]):
        raise ConfigError(f"{spec} does not have the form package.module:Name, for example my_nets:Net.")
    if sys.path[:1] != [""]:  # unlike with `python -m`, a console script's sys.path lacks the current folder
        _first_on_path(Path.cwd())
    importlib.invalidate_caches()
    return module_name, name, _source_of(module_name)


def import_file(path: Path, name: str, setting: str) -> ModuleType:
    """Import the file `path` as the module `name`; its folder is put on `sys.path` for its siblings.

    The module stays in `sys.modules`, where pickle looks classes up.

    Raises:
        UserCodeError: the import fails.
    """
    if name in sys.modules:
        return sys.modules[name]
    _first_on_path(path.parent)
    importlib.invalidate_caches()

    def run() -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        return module

    with wrap_user_errors(setting, "cannot be imported"):
        return _import(run, path)


def _import(run: Callable[[], ModuleType], source: Path | None) -> ModuleType:
    # If torchvision's operators do not match, the missing ones must be declared before user code imports it. Code that
    # never mentions torchvision does not pay for its import (1.1 s); code that imports it indirectly is executed twice.
    if source and any(b"torchvision" in file.read_bytes() for file in source.parent.glob("*.py")):
        import_torchvision()
    try:
        return run()
    except RuntimeError as error:
        if not is_missing_operator(error):
            raise
    import_torchvision()
    return run()


def _first_on_path(folder: Path) -> None:
    sys.path[:] = [str(folder), *(entry for entry in sys.path if entry != str(folder))]


def _source_of(module_name: str) -> Path | None:
    """Return the file of a module without executing its parents, or None if only an import can tell."""
    top, *rest = module_name.split(".")
    try:
        spec = importlib.util.find_spec(top)
        for depth in range(len(rest)):
            search = spec.submodule_search_locations if spec else None
            spec = PathFinder.find_spec(".".join([top, *rest[: depth + 1]]), search) if search else None
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.has_location and spec.origin else None


def _missing_module(spec: str, module_name: str, missing: str) -> str:
    if spec.partition(":")[0].endswith(".py"):
        return f"{spec}: name the module, not its file. Did you mean {spec.replace('.py:', ':')}?"
    *parents, last = missing.split(".")
    folder = Path.cwd().joinpath(*parents)
    names = sorted({path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/*.py")})
    near = did_you_mean(last, names, ".".join([*parents, ""]))
    return f"{spec}: no module {missing}, neither in {Path.cwd()} nor among the installed packages.{near}"


# --- errors ------------------------------------------------------------------------------------------------------


@contextmanager
def wrap_user_errors(
    label: str, what: str, pass_through: Callable[[BaseException], bool] = lambda _: False
) -> Iterator[None]:
    """Turn an exception of user code into a UserCodeError that begins with `label` and names file and line.

    Exceptions for which `unless` returns True are not errors of user code and pass unchanged.
    """
    try:
        yield
    except DistTrainError:
        raise
    except (Exception, SystemExit) as error:  # SystemExit: a script without `if __name__ == "__main__"`
        if pass_through(error):
            raise
        raise user_code_error(f"{label} {what}", error) from error


def user_code_error(what: str, error: BaseException, hint: str = "") -> UserCodeError:
    """Return a one-line error: `what`, the place in user code where `error` was raised, the error, and `hint`."""
    if isinstance(error, SyntaxError):
        where, text = f"{error.filename}:{error.lineno}" if error.filename else "its source", error.msg
    else:
        where, text = _where(error), " ".join(str(error).split())
    return UserCodeError(f"{what}: {where}: {f'{type(error).__name__}: {text}'.rstrip('.')}.{hint}")


def _where(error: BaseException) -> str:
    """Return file:line of the innermost frame whose code is neither ours nor installed."""
    installed = {sysconfig.get_path(key) for key in ("stdlib", "purelib", "platlib")} | {str(Path(__file__).parents[1])}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    own = [frame for frame in frames if not any(frame.filename.startswith(f"{folder}/") for folder in installed)]
    last = (own or frames)[-1]
    return f"{last.filename}:{last.lineno}"


def list_names(module: ModuleType, wanted: str) -> str:
    """List the public classes and functions defined in a module with their lines, and suggest one for `wanted`."""
    own = {
        name: f"{name} (line {line_of(value)})"
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__ and callable(value) and not name.startswith("_")
    }
    shown = [*own.values()][:_MOST_NAMES] + ["..."] * (len(own) > _MOST_NAMES)
    return f"Found: {', '.join(shown) or 'nothing'}.{did_you_mean(wanted, own)}"


def line_of(thing: Any) -> int:
    """Return the line where a class or function of the user begins, or 0 if its source is not available."""
    try:
        return inspect.getsourcelines(inspect.unwrap(thing))[1]
    except (OSError, TypeError):
        return 0


# --- calling -----------------------------------------------------------------------------------------------------


def accepted_arguments(factory: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """Return the items of `offered` that the signature of `factory` names; a bare `**kwargs` accepts none."""
    named, _ = parameters_of(factory)
    return {key: value for key, value in offered.items() if key in named}


def check_arguments(factory: Callable[..., Any], args: Mapping[str, Any], setting: str) -> None:
    """Raise ConfigError, with the valid names, if `args` has a name that is not a parameter of `factory`."""
    legal, open_ended = parameters_of(factory)
    for key in args:
        if key not in legal and not open_ended:
            near = did_you_mean(key, legal, f"{setting}.")
            raise ConfigError(f"Unknown setting {setting}.{key}.{near} It takes: {', '.join(legal) or 'nothing'}.")


def parameters_of(factory: Callable[..., Any]) -> tuple[list[str], bool]:
    """Return the names of keyword parameters, and whether there may be others that are not known.

    By convention a class passes `**kwargs` to its base, and a function to the class of its return annotation; their
    parameters are included.
    """
    layers: list[Any] = [factory]
    if inspect.isclass(factory):  # the last constructor of a net, nn.Module's, has a **kwargs that accepts nothing
        own = [base for base in factory.__mro__[:-1] if base.__module__ != "torch.nn.modules.module"]
        layers = [vars(base)["__init__"] for base in own if "__init__" in vars(base)]
    names: list[str] = []
    for layer in layers:
        try:
            parameters = inspect.signature(layer).parameters.values()
        except (TypeError, ValueError):  # some builtins have no signature
            return names, True
        names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        names = [name for name in dict.fromkeys(names) if name != "self"]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return names, False
    if not layers:
        return [], False
    try:
        returned = None if inspect.isclass(factory) else get_type_hints(factory).get("return")
    except (NameError, TypeError):
        returned = None
    if not inspect.isclass(returned):
        return names, True
    more, open_ended = parameters_of(returned)
    return list(dict.fromkeys([*names, *more])), open_ended
