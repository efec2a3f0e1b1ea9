"""User-defined data sets, named `package.module:Name` and called like torchvision's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset

from dist_train.data.sets.data_folder import locked
from dist_train.data.sets.image_set import Examples
from dist_train.data.sets.split_choice import Choice, every_split
from dist_train.errors import ConfigError
from dist_train.user_code.importing import check_arguments, load_object, parameters_of, wrap_user_errors


def load_user_sets(name: str, root: Path, args: dict[str, Any], choose: Choice = every_split) -> dict[str, Examples]:
    """Return the chosen splits of `name`, under "train", "val" and "test".

    The callable is called with `root` if it accepts that, with `args`, and with the first of these arguments that it
    accepts and `args` does not set:
    - `train`: True gives "train", False gives "test";
    - `split`: "train" and "test", or, if the callable has an attribute `splits` (a collection of names), those of
      "train", "val" and "test" that it lists;
    - neither: only "train" exists.
    An exception never means that a split does not exist: a ValueError may be a bug.

    Raises:
        ConfigError: it is not a map-style data set, or does not accept `args`.
        UserCodeError: it cannot be found, or raises an error.
    """
    target = load_object(name)
    _check_not_iterable(target, name)
    if not callable(target):
        raise ConfigError(f"data.name={name} is of type {type(target).__name__}. Name a class or a function.")
    check_arguments(target, args, "data.args")
    named, _ = parameters_of(target)
    given = {"root": str(root), **args} if "root" in named else dict(args)
    splits: dict[str, Examples] = {}
    # One process at a time if the set downloads itself: torchvision's downloads are not safe to run concurrently.
    with locked(root) if args.get("download") else nullcontext():
        selections = _selections(target, set(named) - set(args), name)
        for split in choose(selections):
            selection = selections[split]
            call = f"{name}({', '.join(f'{key}={value!r}' for key, value in selection.items())})"
            splits[split] = check_map_style(_call(target, given | selection, call), call)
    return splits


def check_takes_root(name: str, args: dict[str, Any], settings: str) -> None:
    """Check that the folder which `settings` give reaches the callable `name`.

    Raises:
        ConfigError: it has no argument `root`, or `args` sets it.
        UserCodeError: it cannot be found, or raises an error.
    """
    named, _ = parameters_of(load_object(name))
    taken = f"data.args.root={args['root']} sets it" if "root" in args else ""
    if taken or "root" not in named:
        reason = taken or f"{name} has no argument root"
        raise ConfigError(f"{settings} is passed on as root, but {reason}. Change that, or remove data.val_root.")


def check_map_style(dataset: Any, what: str) -> Examples:
    """Return `dataset` if its examples can be addressed by index.

    Raises:
        ConfigError
    """
    _check_not_iterable(dataset, what)
    missing = [method for method in ("__len__", "__getitem__") if not hasattr(dataset, method)]
    if missing:
        raise ConfigError(
            f"{what} is a {type(dataset).__name__} without {' and '.join(missing)}; dist_train needs a map-style data "
            "set, since exact sharding and resume address examples by index. Add the method."
        )
    return dataset  # type: ignore[no-any-return]


def _check_not_iterable(item: Any, what: str) -> None:
    kind = item if isinstance(item, type) else type(item)
    if issubclass(kind, IterableDataset):
        raise ConfigError(
            f"{what} is an IterableDataset; dist_train needs a map-style data set with __len__ and __getitem__, since "
            "exact sharding and resume address examples by index."
        )


def _selections(target: Any, free: set[str], name: str) -> dict[str, dict[str, Any]]:
    """Return the selecting argument of each existing split."""
    if "train" in free:
        return {"train": {"train": True}, "test": {"train": False}}
    if "split" not in free:
        return {"train": {}}
    listed = getattr(target, "splits", ("train", "test"))
    if "train" not in listed:
        raise ConfigError(f"{name}.splits is {', '.join(map(str, listed))}. One of them must be train.")
    return {split: {"split": split} for split in ("train", "val", "test") if split in listed}


def _call(target: Callable[..., Any], arguments: dict[str, Any], call: str) -> Any:
    hint = " (an attribute `splits` can list the splits that exist)" if "split=" in call else ""
    with wrap_user_errors(call, f"failed{hint}"):
        return target(**arguments)
