"""Data sets of the user, by `package.module:Name`: called the way torchvision calls its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset

from dist_train.data.sets.image_set import Examples
from dist_train.data.sets.storage import locked
from dist_train.errors import ConfigError
from dist_train.user_code.importing import check_arguments, load_object, parameters_of, wrap_user_errors


def load_user_sets(name: str, root: Path, args: dict[str, Any]) -> dict[str, Examples]:
    """The splits that `name` has, under "train", "val" and "test".

    It is called with `root` if it takes that, with `args`, and with the first of these that it takes and `args` leaves
    open:
    - `train`: True gives "train", False gives "test";
    - `split`: "train" and "test", or, where the callable has an attribute `splits` (a collection of names), those of
      "train", "val" and "test" that it lists;
    - neither: there is "train" alone.
    Which splits exist is never concluded from an exception: a ValueError may just as well be a fault.

    Raises:
        ConfigError: it is no map-style data set, or does not take what `args` holds.
        UserCodeError: it cannot be found, or fails.
    """
    target = load_object(name)
    _refuse_iterable(target, name)
    if not callable(target):
        raise ConfigError(f"data.name={name} is of type {type(target).__name__}. Name a class or a function.")
    check_arguments(target, args, "data.args")
    named, _ = parameters_of(target)
    given = {"root": str(root), **args} if "root" in named else dict(args)
    splits: dict[str, Examples] = {}
    # One process at a time where the set downloads itself: torchvision's classes are not safe against each other.
    with locked(root) if args.get("download") else nullcontext():
        for split, selection in _selections(target, set(named) - set(args), name).items():
            call = f"{name}({', '.join(f'{key}={value!r}' for key, value in selection.items())})"
            splits[split] = check_map_style(_call(target, given | selection, call), call)
    return splits


def check_map_style(dataset: Any, what: str) -> Examples:
    """`dataset` itself, if examples can be addressed by index.

    Raises:
        ConfigError
    """
    _refuse_iterable(dataset, what)
    lacking = [method for method in ("__len__", "__getitem__") if not hasattr(dataset, method)]
    if lacking:
        raise ConfigError(
            f"{what} is a {type(dataset).__name__} without {' and '.join(lacking)}; dist_train needs a map-style data "
            "set, since exact sharding and resume address examples by index. Add the method."
        )
    return dataset  # type: ignore[no-any-return]


def _refuse_iterable(thing: Any, what: str) -> None:
    kind = thing if isinstance(thing, type) else type(thing)
    if issubclass(kind, IterableDataset):
        raise ConfigError(
            f"{what} is an IterableDataset; dist_train needs a map-style data set with __len__ and __getitem__, since "
            "exact sharding and resume address examples by index."
        )


def _selections(target: Any, free: set[str], name: str) -> dict[str, dict[str, Any]]:
    """For each split that there is, the argument that selects it."""
    if "train" in free:
        return {"train": {"train": True}, "test": {"train": False}}
    if "split" not in free:
        return {"train": {}}
    listed = getattr(target, "splits", ("train", "test"))
    if "train" not in listed:
        raise ConfigError(f"{name}.splits is {', '.join(map(str, listed))}. One of them must be called train.")
    return {split: {"split": split} for split in ("train", "val", "test") if split in listed}


def _call(target: Callable[..., Any], arguments: dict[str, Any], call: str) -> Any:
    hint = " (an attribute `splits` that lists the splits leaves the others out)" if "split=" in call else ""
    with wrap_user_errors(call, f"failed{hint}"):
        return target(**arguments)
