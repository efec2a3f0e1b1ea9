"""BK.Synapse user code, run unchanged: a folder or zip with `bks_dataset.py` and/or `bks_model.py`.

bks_dataset.py   class UserDataset(data_path), optionally class UserValDataset(data_path); method collate(batch)
bks_model.py     class UserModel(); method loss(output, target), optionally metrics(output, target) -> dict
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dist_train.errors import ConfigError, DataError, UserCodeError
from dist_train.user_code.archives import unpacked
from dist_train.user_code.importing import check_arguments, closest, defines, explained, found, import_file, line_of

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import Dataset

_folders: set[Path] = set()  # of the bundles that this process has opened


def load_dataset_bundle(path: Path, data_root: Path) -> tuple[Dataset[Any], Dataset[Any] | None]:
    """UserDataset and UserValDataset (None if there is none), made with `data_path=data_root`.

    Raises:
        ConfigError: nothing at `path`, or a data set that can only be iterated over.
        DataError: `data_root` cannot be made, or the bundled MNIST not unpacked there.
        UserCodeError: what lies there does not have the interface above, or fails.
    """
    module = _open(path, "bks_dataset.py", "data.bundle")
    train_class = _class(module, "UserDataset")
    val_class = _class(module, "UserValDataset") if hasattr(module, "UserValDataset") else None
    classes = [train_class] if val_class is None else [train_class, val_class]
    for cls in classes:
        _check_dataset(cls)
        _pickle_with_module(cls, module)
    try:
        data_root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"data.root={data_root} cannot be made: {error.strerror}. Set data.root.") from error
    _link_torchvision_folders(module, data_root)
    sets = []
    for cls in classes:
        with explained(_label(cls), f"made with data_path={str(data_root)!r} failed"):
            sets.append(cls(str(data_root)))
    return sets[0], sets[1] if val_class else None


def load_model_bundle(path: Path, args: Mapping[str, Any] | None = None) -> nn.Module:
    """UserModel, made with the keyword arguments `args`.

    Raises:
        ConfigError: nothing at `path`, or `args` that UserModel does not take.
        UserCodeError: what lies there does not have the interface above, or fails.
    """
    from torch import nn

    cls = _class(_open(path, "bks_model.py", "model.bundle"), "UserModel")
    if not issubclass(cls, nn.Module):
        raise UserCodeError(f"{_label(cls)} is not a torch.nn.Module. Derive it from one.")
    _check_method(cls, "loss", "output", "target")
    if hasattr(cls, "metrics"):
        _check_method(cls, "metrics", "output", "target")
    check_arguments(cls, args or {}, "model.args")
    with explained(_label(cls), "cannot be made"):
        model: nn.Module = cls(**(args or {}))
    return model


# --- finding and importing ---------------------------------------------------------------------------------------


def check_bundle(path: Path, filename: str, name: str, setting: str) -> None:
    """See that the class `name` is there. A file whose source shows it is not run.

    Raises:
        ConfigError, UserCodeError
    """
    file = _find(path, filename, f"{setting}={path}")
    if not defines(file, name):
        _class(_import_bundled(file, f"{setting}={path}"), name)


def _open(path: Path, filename: str, setting: str) -> ModuleType:
    label = f"{setting}={path}"
    return _import_bundled(_find(path, filename, label), label)


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


def _import_bundled(file: Path, label: str) -> ModuleType:
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


class _Module:
    """Pickled ahead of a data set: unpickling it imports the module that the data set's class is looked up in."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return _import_bundled, (Path(self.file), self.file)


def _rebuild(_module: object, make: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return make(*arguments)


def _pickle_with_module(cls: type, module: ModuleType) -> None:
    # Loader workers that are spawned, not forked, have never heard of the module's name.
    if any(name in vars(base) for base in cls.__mro__[:-1] for name in ("__reduce__", "__reduce_ex__")):
        return  # the user's code has its own way
    file = str(module.__file__)

    def reduce(self: object, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = object.__reduce_ex__(self, protocol)
        make, arguments, *state = reduced
        return _rebuild, (_Module(file), make, arguments), *state

    cls.__reduce_ex__ = reduce  # type: ignore[assignment]


# --- the interface -----------------------------------------------------------------------------------------------


def _label(cls: type) -> str:
    module = sys.modules[cls.__module__]
    return f"{cls.__name__} ({Path(str(module.__file__)).name}:{line_of(cls)})"


def _class(module: ModuleType, name: str) -> type:
    cls = getattr(module, name, None)
    if inspect.isclass(cls):
        return cls
    file = Path(str(module.__file__)).name
    raise UserCodeError(f"{file}: class {name} is missing. {found(module, name)} In {module.__file__}.")


def _check_method(cls: type, name: str, *arguments: str) -> None:
    wanted = f"{name}({', '.join(arguments)})"
    method = getattr(cls, name, None)
    if not callable(method):
        own = [key for key, value in vars(cls).items() if callable(value) and not key.startswith("_")]
        near = f" Did you mean {closest(name, own)}?" if closest(name, own) else ""
        raise UserCodeError(f"{_label(cls)} has no method {wanted}.{near} In {inspect.getfile(cls)}.")
    try:
        unbound = not isinstance(inspect.getattr_static(cls, name), (staticmethod, classmethod))
        inspect.signature(method).bind(*([cls] if unbound else []), *arguments)
    except TypeError as error:
        where = f"{Path(inspect.getfile(cls)).name}:{line_of(method)}"
        raise UserCodeError(f"{cls.__name__}.{name} ({where}) cannot be called as {wanted}: {error}.") from None


def _check_dataset(cls: type) -> None:
    from torch.utils.data import Dataset, IterableDataset

    if issubclass(cls, IterableDataset):
        raise ConfigError(
            f"{_label(cls)} is an IterableDataset. Exact sharding and resume address examples by index: "
            "make it a Dataset with __len__ and __getitem__."
        )
    for name in ("__len__", "__getitem__"):
        if getattr(cls, name, None) in (None, Dataset.__getitem__):
            raise UserCodeError(f"{_label(cls)} has no method {name}. Exact sharding and resume need it.")
    _check_method(cls, "collate", "batch")


# --- torchvision's folders ---------------------------------------------------------------------------------------


def _link_torchvision_folders(module: ModuleType, data_root: Path) -> None:
    """torchvision's MNIST family reads `<root>/<name of the class>/raw`, so `class UserDataset(MNIST)` would find
    nothing in `UserDataset/raw` and download: a link leads from the derived class's name to its base's.
    """
    classes: list[Any] = [value for value in vars(module).values() if inspect.isclass(value)]
    for cls in classes:
        ancestors = [base for base in cls.__mro__ if hasattr(base, "raw_folder")]
        base = next((base for base in ancestors if base.__module__.startswith("torchvision.")), None)
        if base is None or cls.raw_folder is not base.raw_folder:
            continue  # not of this family, or the user's code has a folder of its own
        if base.__name__ == "MNIST":
            from dist_train.data.sets.download import fetch

            fetch("mnist", data_root, None)
        if cls.__name__ != base.__name__:
            _link(data_root / cls.__name__, data_root / base.__name__, cls)


def _link(link: Path, target: Path, cls: type) -> None:
    try:
        target.mkdir(exist_ok=True)
        try:
            link.symlink_to(target.name)  # atomic: of several ranks one makes it, the others find it
        except FileExistsError:
            if link.resolve() == target.resolve():
                return
            holds = f"a link to {link.readlink()}" if link.is_symlink() else "a file or folder of its own"
            raise UserCodeError(
                f"{_label(cls)} reads its files from {link}, which is {holds} and not a link to {target.name}. "
                "Give each bundle its own data.root, or move this away."
            ) from None
    except OSError as error:
        raise UserCodeError(
            f"{_label(cls)} needs the link {link} -> {target.name}, which cannot be made: {error.strerror}. "
            "Set data.root to a folder that can be written to."
        ) from error
