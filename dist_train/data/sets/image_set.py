"""Image sets that lie in memory as uint8, and parts of sets that do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dist_train.distributed.devices import is_out_of_memory
from dist_train.errors import DataError, DistTrainError
from dist_train.user_code.importing import user_code_error


@dataclass(frozen=True, eq=False)  # compared by identity: == of tensors is a tensor
class ImageSet:
    """A whole split in memory. Pixels stay uint8 until they are on the device: a quarter of the room and of the copies.

    Raises:
        DataError: shapes, types or lengths do not fit each other, a label has no class, or there is no image.
    """

    images: Tensor  # uint8 [N, C, H, W]
    labels: Tensor  # int64 [N], each in range(len(classes))
    classes: tuple[str, ...]
    names: tuple[str, ...] = ()  # of the files that the images were decoded from, if they were

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise DataError(f"Images must be uint8 [N, C, H, W], these are {form_of(self.images)}.")
        if self.labels.dtype != torch.int64 or self.labels.ndim != 1:
            raise DataError(f"Labels must be int64 [N], these are {form_of(self.labels)}.")
        if len(self.images) != len(self.labels):
            raise DataError(f"{len(self.images)} images but {len(self.labels)} labels; each image needs one.")
        if not len(self.images):
            raise DataError("The set holds no images.")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.classes):
            raise DataError(
                f"Labels run from {low} to {high}, but {len(self.classes)} classes allow 0 to {len(self.classes) - 1}."
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image, uint8 [C, H, W], and its label: what a streamed set gives too."""
        return self.images[index], int(self.labels[index])

    def subset(self, indices: Tensor) -> ImageSet:
        """The examples at `indices` (int64 [M]), copied, in that order."""
        return ImageSet(self.images[indices], self.labels[indices], self.classes)


class Subset(Dataset[Any]):
    """Some examples of a map-style data set, with what the harness asks a data set for besides examples.

    torch's `Subset` would lose these: `collate` decides what a batch looks like.
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
    return len(examples)  # type: ignore[arg-type]  # torch's Dataset does not declare __len__; ours is checked


def subset_of(examples: Examples, indices: Tensor) -> Examples:
    """The examples at `indices` (int64 [M]), in that order."""
    return examples.subset(indices) if isinstance(examples, ImageSet) else Subset(examples, indices)


def origin(examples: Examples, index: int) -> tuple[Any, int]:
    """The data set as it was given, and where in it the example at `index` is: validation may have been held out."""
    whole: Any = examples
    while isinstance(whole, Subset):
        whole, index = whole.whole, int(whole.indices[index])
    return whole, index


def name_of(examples: Examples, index: int) -> str:
    """For people: "Example 77 of Mine"."""
    whole, place = origin(examples, index)
    return f"Example {place} of {type(whole).__name__}"


def example_at(examples: Examples, index: int) -> Any:
    """`examples[index]`.

    Raises:
        UserCodeError: that failed; the example and the user's file and line are named.
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
            hint = f" Its len() is {len(origin(examples, index)[0])}: more than it holds?"
        raise user_code_error(f"{name_of(examples, index)} cannot be made", error, hint) from error


def form_of(made: Any) -> str:
    """For people: "(float32 [1, 28, 28], int)"."""
    if hasattr(made, "shape") and hasattr(made, "dtype"):
        return f"{str(made.dtype).removeprefix('torch.')} {list(made.shape)}"
    if isinstance(made, Mapping):
        return f"{{{', '.join(f'{key}: {form_of(item)}' for key, item in made.items())}}}"
    if isinstance(made, (list, tuple)):
        return f"({', '.join(map(form_of, made[:_SHOWN]))}{', ...' * (len(made) > _SHOWN)})"
    kind = type(made)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


_SHOWN = 4  # items of a list


def yields_pixels(examples: Examples) -> bool:
    """Sets of ours give uint8 pixels, to be normalised on the device; user code gives what its transforms make."""
    return isinstance(examples, ImageSet) or getattr(examples, "yields_pixels", False)
