"""The user's own Python: `package.module:Name`, and files by path; every mistake told with its file and line."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from dist_train.errors import ConfigError, DistTrainError, UserCodeError
from dist_train.torchvision_compat import import_torchvision, is_missing_operator


def load_object(spec: str) -> Any:
    """What `package.module:Name` stands for, looked up in the current folder first.

    Raises:
        ConfigError: `spec` is not of this form.
        UserCodeError: no such module or name, or the module fails while it is imported.
    """
    module_name, name, source = _look_up(spec)
    with wrap_user_errors(spec, "cannot be imported"):
        try:
            module = _import(lambda: importlib.import_module(module_name), source)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise  # the module is there; something that it imports is not
            raise UserCodeError(_missing_module(spec, module_name, error.name)) from None
    if hasattr(module, name):
        return getattr(module, name)
    raise UserCodeError(f"{spec}: {module.__file__ or module_name} has no {name}. {found(module, name)}")


def check_object(spec: str) -> None:
    """See that `load_object` would find it. A module whose source shows the name is not run.

    Raises:
        ConfigError, UserCodeError: as there.
    """
    _module_name, name, source = _look_up(spec)
    if source is None or not defines(source, name):
        load_object(spec)


def defines(source: Path, name: str) -> bool:
    """Whether a file of Python defines a class, a function or a value of this name, as far as its text shows."""
    try:
        tree = ast.parse(source.read_bytes())
    except (OSError, SyntaxError, ValueError):  # gone, or no Python
        return False
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else ()
        if name in (getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)):
            return True
    return False


def _look_up(spec: str) -> tuple[str, str, Path | None]:
    """Of `package.module:Name` the module, the name, and the module's file if it can be told without an import."""
    module_name, _, name = spec.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), name]):
        raise ConfigError(f"{spec}: not of the form package.module:Name, as in my_nets:Net.")
    if sys.path[:1] != [""]:  # a console script, unlike `python -m`, does not have the current folder there
        _first_on_path(Path.cwd())
    importlib.invalidate_caches()
    return module_name, name, _source_of(module_name)


def import_file(path: Path, name: str, setting: str) -> ModuleType:
    """The module in the file `path`, imported as `name`; its folder is on `sys.path` for its siblings.

    It stays in `sys.modules`, where pickle looks classes up.

    Raises:
        UserCodeError: the file fails while it is imported.
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
    # With operators that do not fit, torchvision has to be mended before the user's code asks for it. Who never
    # names it does not pay its 1.1 s. Code that gets it through a module further away is simply run again.
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
    """The file of a module, found without running its parents; None where only an import can tell."""
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
    *parents, last = missing.split(".")
    folder = Path.cwd().joinpath(*parents)
    there = sorted({path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/*.py")})
    prefix = ".".join([*parents, ""])
    near = f" Did you mean {prefix}{closest(last, there)}?" if closest(last, there) else ""
    return f"{spec}: no module {missing}, neither in {Path.cwd()} nor among the installed packages.{near}"


# --- errors ------------------------------------------------------------------------------------------------------


@contextmanager
def wrap_user_errors(
    label: str, what: str, unless: Callable[[BaseException], bool] = lambda _: False
) -> Iterator[None]:
    """Turns an exception of the user's code into a UserCodeError that begins with `label` and names file and line.

    `unless`: whether an exception is not the user's.
    """
    try:
        yield
    except DistTrainError:
        raise
    except (Exception, SystemExit) as error:  # SystemExit: a script without `if __name__ == "__main__"`
        if unless(error):
            raise
        raise user_code_error(f"{label} {what}", error) from error


def user_code_error(what: str, error: BaseException, hint: str = "") -> UserCodeError:
    """One line that begins with `what`, says where in the user's code `error` was raised, and ends with `hint`."""
    if isinstance(error, SyntaxError):
        where, text = f"{error.filename}:{error.lineno}" if error.filename else "its source", error.msg
    else:
        where, text = _where(error), " ".join(str(error).split())
    return UserCodeError(f"{what}: {where}: {f'{type(error).__name__}: {text}'.rstrip('.')}.{hint}")


def _where(error: BaseException) -> str:
    """file:line of the last call made by code that is neither ours nor installed."""
    installed = {sysconfig.get_path(key) for key in ("stdlib", "purelib", "platlib")} | {str(Path(__file__).parents[1])}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    own = [frame for frame in frames if not any(frame.filename.startswith(f"{folder}/") for folder in installed)]
    last = (own or frames)[-1]
    return f"{last.filename}:{last.lineno}"


def closest(word: str, names: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, list(names), n=1, cutoff=0.5)), None)


def found(module: ModuleType, wanted: str) -> str:
    """What a module has instead of `wanted`: its own public classes and functions, with their lines."""
    own = {
        name: f"{name} (line {line_of(value)})"
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__ and callable(value) and not name.startswith("_")
    }
    near = closest(wanted, own)
    return f"Found: {', '.join(own.values()) or 'nothing'}.{f' Did you mean {near}?' if near else ''}"


def line_of(thing: Any) -> int:
    """The line where a class or function of the user begins; 0 if its source is not there."""
    try:
        return inspect.getsourcelines(inspect.unwrap(thing))[1]
    except (OSError, TypeError):
        return 0


# --- calling -----------------------------------------------------------------------------------------------------


def accepted(factory: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `offered` that the signature of `factory` names; a bare `**kwargs` attracts none."""
    named, _ = parameters_of(factory)
    return {key: value for key, value in offered.items() if key in named}


def check_arguments(factory: Callable[..., Any], args: Mapping[str, Any], setting: str) -> None:
    """Raises ConfigError if `factory` has no parameter of such a name, and lists the ones it has."""
    legal, open_ended = parameters_of(factory)
    for key in args:
        if key not in legal and not open_ended:
            near = f" Did you mean {setting}.{closest(key, legal)}?" if closest(key, legal) else ""
            raise ConfigError(f"Unknown setting {setting}.{key}.{near} It takes: {', '.join(legal) or 'nothing'}.")


def parameters_of(factory: Callable[..., Any]) -> tuple[list[str], bool]:
    """The names that can be given by keyword, and whether there are more that nobody can know.

    `**kwargs` is followed to where it goes by custom: from a class to its base, from a function to the class that it
    is annotated to return.
    """
    layers: list[Any] = [factory]
    if inspect.isclass(factory):  # the last constructor of a net, nn.Module's, has a **kwargs that takes nothing
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
        made = None if inspect.isclass(factory) else get_type_hints(factory).get("return")
    except (NameError, TypeError):
        made = None
    if not inspect.isclass(made):
        return names, True
    more, open_ended = parameters_of(made)
    return list(dict.fromkeys([*names, *more])), open_ended
