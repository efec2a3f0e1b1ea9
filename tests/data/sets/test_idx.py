"""Image sets and IDX files."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dist_train.data.sets.idx import read_idx, read_idx_set
from dist_train.data.sets.image_set import ImageSet, Subset, subset_of
from dist_train.errors import DataError

TEN = tuple("0123456789")


def idx_bytes(shape: Sequence[int], content: bytes, magic: bytes = b"\0\0\x08") -> bytes:
    return magic + struct.pack(f">B{len(shape)}I", len(shape), *shape) + content


def small_set(num: int = 6) -> ImageSet:
    return ImageSet(
        torch.arange(num * 12, dtype=torch.uint8).view(num, 3, 2, 2), torch.arange(num) % 3, ("a", "b", "c")
    )


def test_item_is_image_and_label() -> None:
    image, label = small_set()[4]
    assert image.tolist() == torch.arange(48, 60).view(3, 2, 2).tolist()
    assert label == 1
    assert isinstance(label, int)
    assert len(small_set()) == 6
    with pytest.raises(IndexError):  # ends iteration over the set
        small_set()[6]


def test_subset_keeps_order_and_classes() -> None:
    chosen = small_set().subset(torch.tensor([5, 0]))
    assert chosen.images[:, 0, 0, 0].tolist() == [60, 0]
    assert chosen.labels.tolist() == [2, 0]
    assert chosen.classes == ("a", "b", "c")


@pytest.mark.parametrize(
    ("images", "labels", "classes", "words"),
    [
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64), TEN, "float32 [2, 1, 4, 4]"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), TEN, "uint8 [2, 4, 4]"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2), TEN, "float32 [2]"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.int64), TEN, "int64 [2, 1]"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), TEN, "2 images but 3 labels"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 10]), TEN, "from 0 to 10, but 10 classes"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([-1, 0]), TEN, "from -1 to 0"),
        (torch.zeros(0, 1, 4, 4, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), TEN, "no images"),
    ],
)
def test_invalid_image_sets_are_refused(images: Tensor, labels: Tensor, classes: tuple[str, ...], words: str) -> None:
    with pytest.raises(DataError) as caught:
        ImageSet(images, labels, classes)
    assert words in str(caught.value)


def test_subset_of_map_style_set_keeps_its_collate() -> None:
    class Squares:
        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> int:
            return index * index

        def collate(self, batch: list[int]) -> int:
            return sum(batch)

    part = subset_of(Squares(), torch.tensor([9, 2]))  # type: ignore[arg-type]
    assert isinstance(part, Subset)
    assert [part[i] for i in range(len(part))] == [81, 4]
    assert part.collate([1, 2]) == 3  # type: ignore[attr-defined]
    assert not hasattr(part, "yields_pixels")
    assert isinstance(subset_of(small_set(), torch.tensor([1])), ImageSet)


def test_reading_idx(tmp_path: Path) -> None:
    (tmp_path / "images").write_bytes(idx_bytes((3, 2, 4), bytes(range(24))))
    images = read_idx(tmp_path / "images", ndim=3)
    assert images.dtype == torch.uint8
    assert images.tolist() == torch.arange(24).view(3, 2, 4).tolist()
    (tmp_path / "labels").write_bytes(idx_bytes((3,), b"\x02\x00\x09"))
    images_and_labels = read_idx_set(tmp_path / "images", tmp_path / "labels", TEN)
    assert images_and_labels.images.shape == (3, 1, 2, 4)
    assert images_and_labels.labels.tolist() == [2, 0, 9]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (idx_bytes((3, 2, 4), bytes(23)), "40 bytes expected, 39 found"),
        (idx_bytes((3, 2, 4), bytes(25)), "40 bytes expected, 41 found"),
        (idx_bytes((3, 2, 4), b"")[:9], "16 bytes expected, 9 found"),
        (idx_bytes((24,), bytes(24)), "00 00 08 01"),  # labels instead of images
        (idx_bytes((3, 2, 4), bytes(24), magic=b"\0\0\x0d"), "00 00 0d 03"),  # floats
        (b"\x1f\x8b\x08\x00gz", "1f 8b 08 00"),  # still compressed
        (b"", "nothing"),
    ],
)
def test_damaged_idx_file_error_shows_expected_and_found(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_idx(path, ndim=3)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_missing_idx_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere cannot be read: No such file"):
        read_idx(tmp_path / "nowhere", ndim=1)


def test_images_and_labels_of_different_sets_are_refused(tmp_path: Path) -> None:
    (tmp_path / "images").write_bytes(idx_bytes((3, 2, 4), bytes(24)))
    (tmp_path / "labels").write_bytes(idx_bytes((2,), bytes(2)))
    with pytest.raises(DataError, match=r"images and labels do not match: 3 images but 2 labels"):
        read_idx_set(tmp_path / "images", tmp_path / "labels", TEN)
