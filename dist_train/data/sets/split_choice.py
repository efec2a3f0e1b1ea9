"""Which splits of a data set are loaded. A set that serves for validation alone need not have a training split."""

from __future__ import annotations

from collections.abc import Callable, Collection

# Takes the names of the splits that a set has (of train, val and test), and returns those to load. The first is loaded
# even if the set lacks it: the error says so.
Choice = Callable[[Collection[str]], list[str]]


def every_split(present: Collection[str]) -> list[str]:
    return ["train", *(name for name in present if name != "train")]


def all_but_val(present: Collection[str]) -> list[str]:
    return [name for name in every_split(present) if name != "val"]


def one_to_validate(present: Collection[str]) -> list[str]:
    return [next((name for name in ("val", "test", "train") if name in present), "val")]
