"""BK.Synapse user code, run unchanged: a folder or zip with `bks_dataset.py` and/or `bks_model.py`.

bks_dataset.py   class UserDataset(data_path), optionally class UserValDataset(data_path); method collate(batch)
bks_model.py     class UserModel(); method loss(output, target), optionally metrics(output, target) -> dict
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from pathlib import Path
from types import ModuleType

from dist_train.errors import ConfigError, UserCodeError
from dist_train.user_code.archives import unpacked
from dist_train.user_code.importing import closest, defines, found, import_file, line_of

_folders: set[Path] = set()  # of the bundles that this process has opened


# --- finding and importing ---------------------------------------------------------------------------------------


def check_bundle(path: Path, filename: str, name: str, setting: str) -> None:
    """See that the class `name` is there. A file whose source shows it is not run.

    Raises:
        ConfigError, UserCodeError
    """
    file = _find(path, filename, f"{setting}={path}")
    if not defines(file, name):
        class_of(import_bundled(file, f"{setting}={path}"), name)


def open_bundle(path: Path, filename: str, setting: str) -> ModuleType:
    label = f"{setting}={path}"
    return import_bundled(_find(path, filename, label), label)


def _find(path: Path, filename: str, label: str) -> Path:
    """The file in a folder or zip."""
    path = path.expanduser()
    if not path.exists():
        raise ConfigError(f"{label}: no such file or folder. Give a folder or a zip that holds {filename}.")
    if path.is_file() and path.suffix == ".py":
        path = path.parent
    folder = path if path.is_dir() else unpacked(path, label)
    # The files lie on top, or in the one folder that a zip of a folder has.
    candidates = [folder, *sorted(sub for sub in folder.iterdir() if sub.is_dir() and sub.name != "__MACOSX")]
    homes = [home for home in candidates if (home / filename).is_file()]
    if homes[:1] != [folder] and len(homes) != 1:
        names = sorted(str(file.relative_to(folder)) for home in candidates for file in home.glob("*.py"))
        near = closest(filename, names)
        raise UserCodeError(
            f"{label}: {filename} is missing, or in more than one folder. Found: {', '.join(names) or 'no .py file'}."
            f"{f' Did you mean {near}?' if near and near != filename else ''}"
        )
    return homes[0].resolve() / filename


def import_bundled(file: Path, label: str) -> ModuleType:
    """Under a name of its own, so that several bundles fit into one process."""
    digest = hashlib.sha256(str(file).encode() + b"\0" + file.read_bytes()).hexdigest()[:16]
    name = f"{file.stem}_{digest}"
    if name not in sys.modules:
        _set_aside_siblings(file.parent)
    return import_file(file, name, label)


def _set_aside_siblings(folder: Path) -> None:
    """Another bundle's `helpers` must not answer to this one's `import helpers`."""
    others = _folders - {folder}
    for name, module in list(sys.modules.items()):
        origin = getattr(module, "__file__", None)
        top = name.partition(".")[0]
        ours = (folder / f"{top}.py").is_file() or (folder / top).is_dir()
        if ours and origin and any(Path(origin).is_relative_to(other) for other in others):
            del sys.modules[name]
    _folders.add(folder)


# --- the interface -----------------------------------------------------------------------------------------------


def label_of(cls: type) -> str:
    module = sys.modules[cls.__module__]
    return f"{cls.__name__} ({Path(str(module.__file__)).name}:{line_of(cls)})"


def class_of(module: ModuleType, name: str) -> type:
    cls = getattr(module, name, None)
    if inspect.isclass(cls):
        return cls
    file = Path(str(module.__file__)).name
    raise UserCodeError(f"{file}: class {name} is missing. {found(module, name)} In {module.__file__}.")


def check_method(cls: type, name: str, *arguments: str) -> None:
    wanted = f"{name}({', '.join(arguments)})"
    method = getattr(cls, name, None)
    if not callable(method):
        own = [key for key, value in vars(cls).items() if callable(value) and not key.startswith("_")]
        near = f" Did you mean {closest(name, own)}?" if closest(name, own) else ""
        raise UserCodeError(f"{label_of(cls)} has no method {wanted}.{near} In {inspect.getfile(cls)}.")
    try:
        unbound = not isinstance(inspect.getattr_static(cls, name), (staticmethod, classmethod))
        inspect.signature(method).bind(*([cls] if unbound else []), *arguments)
    except TypeError as error:
        where = f"{Path(inspect.getfile(cls)).name}:{line_of(method)}"
        raise UserCodeError(f"{cls.__name__}.{name} ({where}) cannot be called as {wanted}: {error}.") from None


# --- torchvision's folders ---------------------------------------------------------------------------------------
