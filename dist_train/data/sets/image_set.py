"""Image sets in memory as uint8, and subsets of other data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dist_train.distributed.devices import is_out_of_memory
from dist_train.errors import DataError, DistTrainError
from dist_train.user_code.importing import user_code_error


@dataclass(frozen=True, eq=False)  # compared by identity: == on tensors returns a tensor
class ImageSet:
    """A whole split in memory. Pixels stay uint8 until they are on the device: a quarter of the memory and transfers.

    Raises:
        DataError: shapes, types or lengths do not match, a label is out of range, or the set is empty.
    """

    images: Tensor  # uint8 [N, C, H, W]
    labels: Tensor  # int64 [N], each in range(len(classes))
    classes: tuple[str, ...]
    names: tuple[str, ...] = ()  # of the files, if the images were decoded from files

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise DataError(f"Images must be uint8 [N, C, H, W], got {describe_value(self.images)}.")
        if self.labels.dtype != torch.int64 or self.labels.ndim != 1:
            raise DataError(f"Labels must be int64 [N], got {describe_value(self.labels)}.")
        if len(self.images) != len(self.labels):
            raise DataError(f"{len(self.images)} images but {len(self.labels)} labels; each image needs one.")
        if not len(self.images):
            raise DataError("The set contains no images.")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.classes):
            raise DataError(
                f"Labels run from {low} to {high}, but {len(self.classes)} classes allow 0 to {len(self.classes) - 1}."
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one image, uint8 [C, H, W], and its label, as a streamed set does."""
        return self.images[index], int(self.labels[index])

    def subset(self, indices: Tensor) -> ImageSet:
        """Return a copy of the examples at `indices` (int64 [M]), in that order."""
        return ImageSet(self.images[indices], self.labels[indices], self.classes)


class Subset(Dataset[Any]):
    """Some examples of a map-style data set, with the other attributes that the harness reads.

    torch's `Subset` loses these attributes, for example `collate`, which builds the batches.
    """

    CARRIED = ("collate", "yields_pixels")

    def __init__(self, whole: Any, indices: Tensor | range) -> None:
        self.whole = whole
        self.indices = indices  # int64 [M], or a range
        for name in self.CARRIED:
            if hasattr(whole, name):
                setattr(self, name, getattr(whole, name))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.whole[int(self.indices[index])]


Examples: TypeAlias = ImageSet | Dataset[Any]  # any data set here has __len__ and __getitem__


def num_examples(examples: Examples) -> int:
    """Return the number of examples."""
    return len(examples)  # type: ignore[arg-type]  # torch's Dataset does not declare __len__; ours is checked


def subset_of(examples: Examples, indices: Tensor) -> Examples:
    """Return the examples at `indices` (int64 [M]), in that order."""
    return examples.subset(indices) if isinstance(examples, ImageSet) else Subset(examples, indices)


def locate(examples: Examples, index: int) -> tuple[Any, int]:
    """Return the original data set and the position of example `index` in it: validation may have been held out."""
    whole: Any = examples
    while isinstance(whole, Subset):
        whole, index = whole.whole, int(whole.indices[index])
    return whole, index


def name_of(examples: Examples) -> str:
    """Return the class of the original data set, for messages."""
    return type(locate(examples, 0)[0]).__name__


def evenly_spaced(examples: Examples, count: int) -> list[int]:
    """Return up to `count` (two or more) indices, the first and the last among them."""
    last = num_examples(examples) - 1
    return sorted({last * part // (count - 1) for part in range(count)})


def describe_example(examples: Examples, index: int) -> str:
    """Return a name for messages: "Example 77 of Mine"."""
    whole, position = locate(examples, index)
    return f"Example {position} of {type(whole).__name__}"


def example_at(examples: Examples, index: int) -> Any:
    """Return `examples[index]`.

    Raises:
        UserCodeError: the access failed; the message names the example and the user's file and line.
    """
    try:
        return examples[index]
    except DistTrainError:
        raise
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            raise
        hint = ""
        if isinstance(error, (IndexError, KeyError)):
            hint = f" Its len() is {len(locate(examples, index)[0])}: is that too large?"
        raise user_code_error(f"{describe_example(examples, index)} cannot be made", error, hint) from error


def classes_of(examples: Examples) -> tuple[list[str] | None, int | None]:
    """Return the names of the classes and their number; None where the set does not define them."""
    classes, count = getattr(examples, "classes", None), getattr(examples, "num_classes", None)
    names = list(map(str, classes)) if isinstance(classes, (list, tuple)) else None
    counted = len(classes) if isinstance(classes, Sized) else None
    return names, count if isinstance(count, int) else counted


def stored_labels(examples: Examples) -> npt.NDArray[Any] | None:
    """Return the integer or string labels [N, ...] that the set stores under torchvision's names, None if it does not.

    Makes no example and calls nothing of the set: either may open a file. N may be another number than its length.
    """
    if isinstance(examples, Subset):
        labels, indices = stored_labels(examples.whole), np.asarray(examples.indices)
        return labels[indices] if labels is not None and indices.max(initial=-1) < len(labels) else None
    kept = getattr(examples, "__dict__", {})  # no properties: one may read all examples
    labels = kept.get("targets", kept.get("labels"))
    if isinstance(labels, Tensor):
        dense = labels.layout == torch.strided and not labels.is_floating_point() and not labels.is_complex()
        labels = labels.cpu().numpy() if dense else None
    elif isinstance(labels, (list, tuple)) and all(isinstance(label, (int, str, np.integer)) for label in labels):
        labels = np.array(labels)
    return labels if isinstance(labels, np.ndarray) and labels.ndim and labels.dtype.kind in "iubU" else None


def describe_value(value: Any) -> str:
    """Return a description for messages: "(float32 [1, 28, 28], int)"."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {describe_value(item)}' for key, item in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(describe_value, value[:_SHOWN]))}{', ...' * (len(value) > _SHOWN)})"
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


_SHOWN = 4  # items of a list


def yields_pixels(examples: Examples) -> bool:
    """Whether the set gives uint8 pixels, normalised on the device. User code gives the result of its transforms."""
    return isinstance(examples, ImageSet) or getattr(examples, "yields_pixels", False)
