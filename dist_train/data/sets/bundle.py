"""The data set of a BK.Synapse bundle: `bks_dataset.py` with UserDataset, optionally UserValDataset."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from dist_train.data.sets.download import fetch
from dist_train.data.sets.image_set import Examples
from dist_train.data.sets.split_choice import Choice, every_split
from dist_train.data.sets.user_sets import check_map_style
from dist_train.errors import ConfigError, DataError, UserCodeError
from dist_train.user_code.bundles import check_method, class_of, import_bundled, label_of, open_bundle
from dist_train.user_code.importing import wrap_user_errors

_CLASSES = {"train": "UserDataset", "val": "UserValDataset"}


def load_dataset_bundle(
    path: Path,
    data_root: Path,
    choose: Choice = every_split,
    path_setting: str = "data.bundle",
    root_setting: str = "data.root",
) -> dict[str, Examples]:
    """Return UserDataset as "train" and UserValDataset, if it is defined, as "val", built with `data_path=data_root`.

    Raises:
        ConfigError: `path` does not exist, or the data set is iterable-style.
        DataError: `data_root` cannot be created, or the bundled MNIST cannot be unpacked there.
        UserCodeError: the bundle does not have this interface, or raises an error.
    """
    module = open_bundle(path, "bks_dataset.py", path_setting)
    chosen = choose([split for split, name in _CLASSES.items() if hasattr(module, name)])
    classes = {split: class_of(module, _CLASSES[split]) for split in chosen}
    for cls in classes.values():
        _check_dataset(cls)
        _pickle_with_module(cls, module)
    try:
        data_root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{root_setting}={data_root} cannot be created: {error.strerror}. Set {root_setting}."
        ) from error
    _link_torchvision_folders(module, data_root, root_setting)
    sets: dict[str, Examples] = {}
    for split, cls in classes.items():
        with wrap_user_errors(label_of(cls), f"made with data_path={str(data_root)!r} failed"):
            sets[split] = check_map_style(cls(str(data_root)), f"{_CLASSES[split]} of {path}")
    return sets


class _Module:
    """Pickled before a data set: unpickling it imports the module that defines the data set's class."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return import_bundled, (Path(self.file), self.file)


def _rebuild(_module: object, make: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return make(*arguments)


def _pickle_with_module(cls: type, module: ModuleType) -> None:
    # Spawned loader workers cannot import the module by its name.
    if any(name in vars(base) for base in cls.__mro__[:-1] for name in ("__reduce__", "__reduce_ex__")):
        return  # user code defines its own pickling
    file = str(module.__file__)

    def reduce(self: object, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = object.__reduce_ex__(self, protocol)
        make, arguments, *state = reduced
        return _rebuild, (_Module(file), make, arguments), *state

    cls.__reduce_ex__ = reduce  # type: ignore[assignment]


def _check_dataset(cls: type) -> None:
    from torch.utils.data import Dataset, IterableDataset

    if issubclass(cls, IterableDataset):
        raise ConfigError(
            f"{label_of(cls)} is an IterableDataset. Exact sharding and resume address examples by index: "
            "make it a Dataset with __len__ and __getitem__."
        )
    for name in ("__len__", "__getitem__"):
        if getattr(cls, name, None) in (None, Dataset.__getitem__):
            raise UserCodeError(f"{label_of(cls)} has no method {name}. Exact sharding and resume need it.")
    check_method(cls, "collate", "batch")


def _link_torchvision_folders(module: ModuleType, data_root: Path, root_setting: str) -> None:
    """Link the folder of each class derived from torchvision's MNIST family to the folder of its base.

    The family reads `<root>/<class name>/raw`: `class UserDataset(MNIST)` would find no files there and download them.
    """
    classes: list[Any] = [value for value in vars(module).values() if inspect.isclass(value)]
    for cls in classes:
        ancestors = [base for base in cls.__mro__ if hasattr(base, "raw_folder")]
        base = next((base for base in ancestors if base.__module__.startswith("torchvision.")), None)
        if base is None or cls.raw_folder is not base.raw_folder:
            continue  # not of this family, or with its own folder
        if base.__name__ == "MNIST":
            fetch("mnist", data_root, None)
        if cls.__name__ != base.__name__:
            _link(data_root / cls.__name__, data_root / base.__name__, cls, root_setting)


def _link(link: Path, target: Path, cls: type, root_setting: str) -> None:
    try:
        target.mkdir(exist_ok=True)
        try:
            link.symlink_to(target.name)  # atomic: one rank creates it, the others find it
        except FileExistsError:
            if link.resolve() == target.resolve():
                return
            actual = f"a link to {link.readlink()}" if link.is_symlink() else "a file or folder"
            raise UserCodeError(
                f"{label_of(cls)} reads its files from {link}, which is {actual} and not a link to {target.name}. "
                f"Give each bundle its own {root_setting}, or move this away."
            ) from None
    except OSError as error:
        raise UserCodeError(
            f"{label_of(cls)} needs the link {link} -> {target.name}, which cannot be created: {error.strerror}. "
            f"Set {root_setting} to a writable folder."
        ) from error
