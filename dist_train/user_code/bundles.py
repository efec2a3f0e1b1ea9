"""BK.Synapse bundles, which run unchanged: a folder or zip with `bks_dataset.py` and/or `bks_model.py`.

bks_dataset.py   class UserDataset(data_path), optionally class UserValDataset(data_path); method collate(batch)
bks_model.py     class UserModel(); method loss(output, target), optionally metrics(output, target) -> dict
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
from pathlib import Path
from types import ModuleType

from dist_train.errors import ConfigError, UserCodeError, did_you_mean
from dist_train.user_code.archives import unpack_archive
from dist_train.user_code.importing import defines, import_file, line_of, list_names

_folders: set[Path] = set()  # folders of the bundles that this process has opened


# --- finding and importing ---------------------------------------------------------------------------------------


def check_bundle(path: Path, filename: str, setting: str, *names: str) -> None:
    """Check that the bundle has one of the classes `names`. The file is executed only if its source shows none.

    Raises:
        ConfigError: `path` does not exist.
        UserCodeError: the file or the class is missing, or the file fails.
    """
    file = find_bundled(path, filename, f"{setting}={path}")
    if not any(defines(file, name) for name in names):
        module = import_bundled(file, f"{setting}={path}")
        class_of(module, next((name for name in names if hasattr(module, name)), names[0]))


def open_bundle(path: Path, filename: str, setting: str) -> ModuleType:
    """Import `filename` from the folder or zip `path`. Raises ConfigError or UserCodeError, as `check_bundle`."""
    label = f"{setting}={path}"
    return import_bundled(find_bundled(path, filename, label), label)


def find_bundled(path: Path, filename: str, label: str) -> Path:
    """Return the file `filename` in a folder or zip. `label` begins the messages of errors.

    Raises:
        ConfigError: `path` does not exist.
        UserCodeError: the file is missing.
    """
    path = Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser may raise, as Path.exists
    if not (os.path.isdir(path) or os.path.isfile(path)):  # noqa: PTH112,PTH113 - no pipe, which may never end
        raise ConfigError(f"{label}: no such file or folder. Give a folder or a zip that holds {filename}.")
    if path.is_file() and path.suffix == ".py":
        path = path.parent
    folder = path if path.is_dir() else unpack_archive(path, label)
    try:
        return locate(folder, filename)
    except UserCodeError as error:
        raise UserCodeError(f"{label}: {error}") from None


def locate(folder: Path, filename: str) -> Path:
    """Return the file `filename` of a bundle: at the top of its folder, or in a subfolder if a zip held a folder.

    Raises:
        UserCodeError: it is missing, or in several subfolders.
    """
    candidates = [folder, *sorted(sub for sub in folder.iterdir() if sub.is_dir() and sub.name != "__MACOSX")]
    matches = [candidate for candidate in candidates if (candidate / filename).is_file()]
    if matches[:1] != [folder] and len(matches) != 1:
        names = sorted(str(file.relative_to(folder)) for candidate in candidates for file in candidate.glob("*.py"))
        near = "" if filename in map(os.path.basename, names) else did_you_mean(filename, names)
        raise UserCodeError(
            f"{filename} is missing or in several folders. Found: {', '.join(names) or 'no .py file'}.{near}"
        )
    return matches[0].resolve() / filename


def import_bundled(file: Path, label: str) -> ModuleType:
    """Import `file` under a unique module name, so that one process can import several bundles."""
    digest = hashlib.sha256(str(file).encode() + b"\0" + file.read_bytes()).hexdigest()[:16]
    name = f"{file.stem}_{digest}"
    if name not in sys.modules:
        _forget_siblings(file.parent)
    return import_file(file, name, label)


def _forget_siblings(folder: Path) -> None:
    """Remove modules of other bundles from sys.modules if `folder` has modules of the same name, such as `helpers`."""
    others = _folders - {folder}
    for name, module in list(sys.modules.items()):
        origin = getattr(module, "__file__", None)
        top = name.partition(".")[0]
        in_folder = (folder / f"{top}.py").is_file() or (folder / top).is_dir()
        if in_folder and origin and any(Path(origin).is_relative_to(other) for other in others):
            del sys.modules[name]
    _folders.add(folder)


# --- the interface -----------------------------------------------------------------------------------------------


def label_of(cls: type) -> str:
    """Return the name of a user's class with its file and line, for error messages."""
    module = sys.modules[cls.__module__]
    return f"{cls.__name__} ({Path(str(module.__file__)).name}:{line_of(cls)})"


def class_of(module: ModuleType, name: str) -> type:
    """Return the class `name` of a user's module, or raise UserCodeError."""
    cls = getattr(module, name, None)
    if inspect.isclass(cls):
        return cls
    file = Path(str(module.__file__)).name
    raise UserCodeError(f"{file}: class {name} is missing. {list_names(module, name)} In {module.__file__}.")


def check_method(cls: type, name: str, *arguments: str) -> None:
    """Check that `cls` has a method that takes these positional arguments, or raise UserCodeError."""
    signature = f"{name}({', '.join(arguments)})"
    method = getattr(cls, name, None)
    if not callable(method):
        own = [key for key, value in vars(cls).items() if callable(value) and not key.startswith("_")]
        near = did_you_mean(name, own)
        raise UserCodeError(f"{label_of(cls)} has no method {signature}.{near} In {inspect.getfile(cls)}.")
    try:
        unbound = not isinstance(inspect.getattr_static(cls, name), (staticmethod, classmethod))
        inspect.signature(method).bind(*([cls] if unbound else []), *arguments)
    except TypeError as error:
        where = f"{Path(inspect.getfile(cls)).name}:{line_of(method)}"
        raise UserCodeError(f"{cls.__name__}.{name} ({where}) cannot be called as {signature}: {error}.") from None
