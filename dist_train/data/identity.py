"""What a run's examples are, in a few numbers: recorded with it, compared at a resume and between ranks."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dist_train.data.loader import Seeded
from dist_train.data.sets.image_folder import ImageFolder
from dist_train.data.sets.image_set import Examples, ImageSet, num_examples

Identity = dict[str, Any]  # of one split; plain enough for JSON

READ_BYTES = 64 * 10**6  # at most, of what lies in memory
_FEW = 4  # examples that are made
_PATIENCE_S = 0.5  # where they are slow, fewer
_PARTS = 8  # of an example's floats


def identify(examples: Examples, seed: int) -> Identity:
    """How many examples, their labels and the names of their files where those lie at hand, and what they hold.

    Pixels that are stored as they are count by their bytes. Of all other sets a few examples are made, as a loader
    worker makes them; their floats count within what another CPU or library may round otherwise. A set that makes two
    different examples under one seed is only named: `unsteady` is the index of one of them.
    """
    found: Identity = {"count": num_examples(examples)}
    labels = _labels(examples)
    if labels is not None:
        found["labels"] = _checksum(labels)
    names = examples.names if isinstance(examples, (ImageSet, ImageFolder)) else ()
    if names:
        found["names"] = f"{zlib.crc32('/'.join(names).encode()):08x}"
    if isinstance(examples, ImageSet) and not names:
        return found | {"pixels": _checksum(examples.images.numpy())}
    return found | _few_examples(examples, seed, decoded=bool(names))


class Difference(NamedTuple):
    split: str
    now: str  # in words, as `then`
    then: str


def differences(now: Mapping[str, Identity], then: Mapping[str, Identity]) -> list[Difference]:
    """The splits that hold other examples, each by the first thing that shows it.

    What one of the two does not tell is not compared: a folder may lie in memory here and be streamed there.
    """
    pairs = ((split, now.get(split, {"count": 0}), then.get(split, {"count": 0})) for split in {**then, **now})
    return [Difference(split, *found) for split, one, other in pairs if (found := _difference(one, other))]


def _difference(now: Identity, then: Identity) -> tuple[str, str] | None:
    if now["count"] != then["count"]:
        return f"{now['count']} examples", f"{then['count']}"
    for part in ("labels", "names", "pixels"):
        if part in now and part in then and now[part] != then[part]:
            return f"{part} with checksum {now[part]}", f"{part} with checksum {then[part]}"
    for index, example in now.get("examples", {}).items():
        other = then.get("examples", {}).get(index)
        if other is not None and (found := _contrast(example, other)):
            return f"an example {index} with {found[0]}", f"one with {found[1]}"
    return None


# --- what lies in memory -----------------------------------------------------------------------------------------


def _labels(examples: Examples) -> npt.NDArray[Any] | None:
    """Whole numbers or names, one for each example, where they lie at hand under the names that torchvision has."""
    kept = getattr(examples, "__dict__", {})  # a property may have to read all examples for it
    stated = kept.get("targets", kept.get("labels"))
    if isinstance(stated, Tensor):
        whole = stated.layout == torch.strided and not stated.is_floating_point() and not stated.is_complex()
        stated = stated.cpu().numpy() if whole else None
    elif isinstance(stated, (list, tuple)) and all(isinstance(label, (int, str, np.integer)) for label in stated):
        stated = np.array(stated)
    if not isinstance(stated, np.ndarray) or stated.dtype.kind not in "iubU":
        return None
    return stated if stated.shape[:1] == (num_examples(examples),) else None


def _checksum(array: npt.NDArray[Any]) -> str:
    """Of its shape and its rows: all of them, or evenly spaced ones. CRC-32 takes half the time of SHA-256."""
    stride = max(1, -(-array.nbytes // READ_BYTES))
    rows = np.ascontiguousarray(array[::stride])
    return f"{zlib.crc32(rows.view(np.uint8).data, zlib.crc32(str(array.shape).encode())):08x}"


# --- examples that have to be made -------------------------------------------------------------------------------


def _few_examples(examples: Examples, seed: int, *, decoded: bool) -> Identity:
    """`decoded`: pictures of ours, always the same, but for a shade between two versions of PIL."""
    make = Seeded(examples, seed)

    def sketch_of(index: int) -> dict[str, Any]:
        _, example = make[0, index]
        return _sketch((example[0].float(), example[1]) if decoded else example)

    last = num_examples(examples) - 1
    until = time.monotonic() + _PATIENCE_S
    sketches: dict[str, Any] = {}
    for index in sorted({last * part // (_FEW - 1) for part in range(_FEW)}):
        if sketches and time.monotonic() > until:
            break
        try:
            sketches[str(index)] = sketch_of(index)
            if not decoded and _contrast(sketches[str(index)], sketch_of(index)):
                return {"unsteady": index}
        except Exception:
            sketches.pop(str(index), None)  # whoever needs it for a batch will say so
    return {"examples": sketches}


def _sketch(example: Any) -> dict[str, Any]:
    """A checksum of all that is exact, shapes too, and some numbers of each array of floats."""
    exact, numbers = 0, []
    for leaf in _leaves(example):
        # Pixels too: another version of what decodes and resizes them rounds in another way.
        if isinstance(leaf, np.ndarray) and (leaf.dtype.kind == "f" or (leaf.dtype == np.uint8 and leaf.ndim > 1)):
            kept = leaf[np.isfinite(leaf)].astype(np.float64).clip(-1e100, 1e100)
            exact = zlib.crc32(str(kept.size).encode(), exact)
            if kept.size:
                numbers.append(_numbers(kept))
        else:
            content = leaf.tobytes() if isinstance(leaf, np.ndarray) else leaf.encode()
            exact = zlib.crc32(content, exact)
    return {"exact": f"{exact:08x}", "floats": numbers}


def _numbers(values: npt.NDArray[Any]) -> list[float]:
    """Their spread, which says what is little, then means of parts (of pictures) and single ones (of noise)."""
    parts = np.array_split(values, min(_PARTS, values.size))
    singles = values[np.linspace(0, values.size - 1, len(parts)).astype(int)]
    return [float(values.std()), *(float(part.mean()) for part in parts), *singles.tolist()]


def _contrast(now: dict[str, Any], then: dict[str, Any]) -> tuple[str, str] | None:
    """What shows that these are sketches of two examples, not of one rounded in two ways; in words."""
    if now["exact"] != then["exact"]:
        return f"checksum {now['exact']}", f"checksum {then['exact']}"
    # As many on both sides, by the checksum of their sizes; a record that somebody has cut tells less.
    for ours, theirs in zip(now["floats"], then["floats"], strict=False):
        little = 0.1 * max(ours[0], theirs[0]) + 1e-6
        for one, other in zip(ours, theirs, strict=False):
            if abs(one - other) > little + 1e-4 * abs(other):
                return f"{one:.6g} in it", f"{other:.6g}"
    return None


def _leaves(value: Any) -> Iterator[npt.NDArray[Any] | str]:
    """What an example is made of: arrays, those of floats as float64, and texts."""
    if isinstance(value, Tensor):
        value = torch.view_as_real(value) if value.is_complex() else value
        value = (value.double() if value.is_floating_point() else value).detach().cpu().numpy()
    if isinstance(value, Mapping):
        yield from chain.from_iterable((str(key), *_leaves(item)) for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        yield f"{type(value).__name__} of {len(value)}"
        yield from chain.from_iterable(map(_leaves, value))
    elif isinstance(value, (np.ndarray, np.generic, float)) and np.asarray(value).dtype.kind in "fiub":
        array = np.asarray(value)
        yield f"{array.dtype} {array.shape}"
        yield array.astype(np.float64) if array.dtype.kind == "f" else array
    else:
        yield str(value) if isinstance(value, (int, str, bytes)) else type(value).__name__
