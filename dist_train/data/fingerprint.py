"""Fingerprints of a run's data, recorded with the run and compared at a resume and between ranks."""

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

from dist_train.data.loader import SeededExamples
from dist_train.data.sets.image_folder import ImageFolder
from dist_train.data.sets.image_set import Examples, ImageSet, evenly_spaced, num_examples, stored_labels

Fingerprint = dict[str, Any]  # fingerprint of one split, JSON-serialisable

READ_BYTES = 64 * 10**6  # upper bound for data in memory
_NUM_SAMPLES = 4
_SAMPLING_LIMIT_S = 0.5  # time limit: fewer examples if they are slow
_PARTS = 8  # of an example's floats


def fingerprint_split(examples: Examples, seed: int) -> Fingerprint:
    """Return the number of examples, checksums of labels and file names where available, and of the content.

    Stored pixels are compared by their bytes. Of all other sets a few examples are made, as in a loader worker; their
    floats are compared within the rounding differences of other CPUs and libraries. A set that makes two different
    examples under one seed has no content fingerprint: `unsteady` is the index of such an example.
    """
    found: Fingerprint = {"count": num_examples(examples)}
    labels = stored_labels(examples)
    if labels is not None and labels.shape[:1] == (found["count"],):
        found["labels"] = checksum(labels)
    names = examples.names if isinstance(examples, (ImageSet, ImageFolder)) else ()
    if names:
        found["names"] = f"{zlib.crc32('/'.join(names).encode(errors='surrogateescape')):08x}"
        found["resized_by"] = "torch"
    if isinstance(examples, ImageSet) and not names:
        return found | {"pixels": checksum(examples.images.numpy())}
    return found | _sample_examples(examples, seed, decoded=bool(names))


class Difference(NamedTuple):
    split: str
    now: str  # description, as is `then`
    then: str


def differences(now: Mapping[str, Fingerprint], then: Mapping[str, Fingerprint]) -> list[Difference]:
    """Return the splits whose examples differ, each with the first difference found.

    Parts that one side lacks are not compared: a folder may be in memory here and streamed there.
    """
    pairs = ((split, now.get(split, {"count": 0}), then.get(split, {"count": 0})) for split in {**then, **now})
    return [Difference(split, *found) for split, one, other in pairs if (found := _difference(one, other))]


def _difference(now: Fingerprint, then: Fingerprint) -> tuple[str, str] | None:
    if now["count"] != then["count"]:
        return f"{now['count']} examples", f"{then['count']}"
    # Older versions resized by PIL: their pixels are up to one level apart, which the examples do not tell.
    if "resized_by" in now and "names" in then and "resized_by" not in then:
        return "pictures resized by torch", "pictures that an older version resized by PIL"
    for part in ("labels", "names", "pixels", "sample weights"):
        if part in now and part in then and now[part] != then[part]:
            return f"{part} with checksum {now[part]}", f"{part} with checksum {then[part]}"
    for index, example in now.get("examples", {}).items():
        other = then.get("examples", {}).get(index)
        if other is not None and (found := _sketch_difference(example, other)):
            return f"an example {index} with {found[0]}", f"one with {found[1]}"
    return None


# --- data in memory ----------------------------------------------------------------------------------------------


def checksum(array: npt.NDArray[Any]) -> str:
    """Return a CRC-32 of the shape and of all or evenly spaced rows. It takes half the time of SHA-256."""
    stride = max(1, -(-array.nbytes // READ_BYTES))
    rows = np.ascontiguousarray(array[::stride])
    return f"{zlib.crc32(rows.view(np.uint8).data, zlib.crc32(str(array.shape).encode())):08x}"


# --- sampled examples --------------------------------------------------------------------------------------------


def _sample_examples(examples: Examples, seed: int, *, decoded: bool) -> Fingerprint:
    """`decoded` marks images of our own decoder: deterministic, up to rounding between PIL versions."""
    make = SeededExamples(examples, seed)

    def sketch_of(index: int) -> dict[str, Any]:
        _, example = make[0, index]
        return _sketch((example[0].float(), example[1]) if decoded else example)

    until = time.monotonic() + _SAMPLING_LIMIT_S
    sketches: dict[str, Any] = {}
    for index in evenly_spaced(examples, _NUM_SAMPLES):
        if sketches and time.monotonic() > until:
            break
        try:
            sketches[str(index)] = sketch_of(index)
            if not decoded and _sketch_difference(sketches[str(index)], sketch_of(index)):
                return {"unsteady": index}
        except Exception:
            sketches.pop(str(index), None)  # reported when a batch needs it
    return {"examples": sketches}


def _sketch(example: Any) -> dict[str, Any]:
    """Return a checksum of the exact content, shapes included, and summary numbers of each float array."""
    exact, numbers = 0, []
    for leaf in _leaves(example):
        # Pixels count as floats: versions of the decoding and resizing code round differently.
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
    """Return the standard deviation, which scales the tolerance, means of parts (images) and single values (noise)."""
    parts = np.array_split(values, min(_PARTS, values.size))
    singles = values[np.linspace(0, values.size - 1, len(parts)).astype(int)]
    return [float(values.std()), *(float(part.mean()) for part in parts), *singles.tolist()]


def _sketch_difference(now: dict[str, Any], then: dict[str, Any]) -> tuple[str, str] | None:
    """Describe how two sketches differ by more than rounding; None if they do not."""
    if now["exact"] != then["exact"]:
        return f"checksum {now['exact']}", f"checksum {then['exact']}"
    # Equal checksums of the sizes imply equal lengths, unless the record was truncated by hand.
    for ours, theirs in zip(now["floats"], then["floats"], strict=False):
        tolerance = 0.1 * max(ours[0], theirs[0]) + 1e-6
        for one, other in zip(ours, theirs, strict=False):
            if abs(one - other) > tolerance + 1e-4 * abs(other):
                return f"{one:.6g} in it", f"{other:.6g}"
    return None


def _leaves(value: Any) -> Iterator[npt.NDArray[Any] | str]:
    """Yield the parts of an example: arrays (floats as float64) and strings."""
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
