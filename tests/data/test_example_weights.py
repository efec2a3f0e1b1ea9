"""The weights of the training examples: balanced over classes that the set stores, or read from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_train.config.batch_plan import BatchPlan
from dist_train.config.data import DataConfig
from dist_train.data.fingerprint import differences
from dist_train.data.sampler import ShardSampler
from dist_train.data.sets.image_set import num_examples
from dist_train.data.splits import Splits, load_splits
from dist_train.errors import DistTrainError

JITTERED = "support.user_sets:Jittered"  # 101 examples of three classes, in an attribute `labels`


def load(name: str = JITTERED, **settings: Any) -> Splits:
    return load_splits(DataConfig(name=name, **settings), seed=0)


def labels_of(splits: Splits) -> Tensor:
    return torch.tensor([splits.train[index][1] for index in range(num_examples(splits.train))])


def test_each_class_is_drawn_equally_often() -> None:
    """Within four standard deviations of the binomial distribution, of each class and of each example of the rarest."""
    splits = load("support.user_sets:Rare", sampling="balanced")
    sampler = ShardSampler(2000, BatchPlan(100, 1, 1), 0, 0, splits.sample_weights)
    drawn = torch.cat([sampler.order(epoch) for epoch in range(10)])
    counts = torch.bincount(torch.tensor([0] * 1800 + [1] * 150 + [2] * 50)[drawn])
    assert ((counts - 20_000 / 3).abs() < 4 * (20_000 * 2 / 9) ** 0.5).all()
    of_each = torch.bincount(drawn, minlength=2000)[-50:]
    assert ((of_each - 20_000 / 150).abs() < 4 * (20_000 / 150) ** 0.5).all()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("val_examples", [0, 40])
def test_balance_is_that_of_the_examples_trained_on(val_examples: int, num_workers: int) -> None:
    splits = load(sampling="balanced", val_examples=val_examples, num_workers=num_workers)
    assert splits.sample_weights is not None
    sums = torch.zeros(3, dtype=torch.float64).index_add(0, labels_of(splits), splits.sample_weights)
    assert sums.tolist() == pytest.approx([1, 1, 1])


def test_weights_of_a_file_follow_their_examples(tmp_path: Path) -> None:
    """Those of held-out examples are left out; text and .npy mean the same."""
    weights = np.arange(101) / 7
    np.save(tmp_path / "w.npy", weights)
    (tmp_path / "w.txt").write_text("\n".join(map(str, weights)))
    for name in ("w.npy", "w.txt"):
        splits = load(sample_weights=tmp_path / name, val_examples=40)
        assert splits.sample_weights is not None
        assert splits.sample_weights.tolist() == weights[splits.train.indices].tolist()  # type: ignore[union-attr]
    assert load().sample_weights is None


REFUSED: dict[str, tuple[Any, str]] = {
    "too few": ("1 2 3", "holds numbers of shape [3], and the training set has 101 examples. Give each one number"),
    "empty": ("", "holds numbers of shape [0], and the training set has 101"),
    "a column": (np.ones((101, 1)), "holds numbers of shape [101, 1], and"),
    "negative": ("1 " * 50 + "-0.5 " + "1 " * 50, "gives example 50 the weight -0.5. Weights are finite, 0 or more."),
    "not a number": ("1 " * 100 + "nan", "gives example 100 the weight nan. "),
    "infinite": ("inf " * 101, "gives example 0 the weight inf. "),
    "all zero": ("0 " * 101, "gives all 101 examples to train on the weight 0. Give one of them more."),
    "words": ("one two", "cannot be read: could not convert string to float: 'one'. Give a .npy file or a text file"),
    "not text": (b"\x93NUMPY", "cannot be read: 'utf-8' codec"),
    "pickled": (np.array([{}]), "cannot be read: Object arrays cannot be loaded"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_file_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    content, words = REFUSED[case]
    path = tmp_path / ("w.npy" if isinstance(content, np.ndarray) else "w.txt")
    if isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DistTrainError) as caught:
        load(sample_weights=path)
    assert str(caught.value).startswith(f"data.sample_weights={path} {words}")
    assert len(str(caught.value).splitlines()) == 1


def test_all_zero_where_others_are_held_out(tmp_path: Path) -> None:
    held_out = load(val_examples=40).val
    weights = np.zeros(101)
    weights[held_out.indices] = 1  # type: ignore[union-attr]
    np.save(tmp_path / "w.npy", weights)
    with pytest.raises(DistTrainError, match="gives all 61 examples to train on the weight 0"):
        load(sample_weights=tmp_path / "w.npy", val_examples=40)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_set_without_stored_classes_is_refused(num_workers: int) -> None:
    """Its examples are not made to find them, and in the workers' case nothing of it is opened here."""
    with pytest.raises(DistTrainError) as caught:
        load("support.user_sets:Lazy", sampling="balanced", num_workers=num_workers)
    assert str(caught.value) == (
        "data.sampling=balanced needs the class of each training example, and the set of "
        "data.name=support.user_sets:Lazy has no attribute targets or labels with one integer or string each. Add it, "
        "or set data.sample_weights=FILE."
    )


def test_settings_that_contradict_each_other(tmp_path: Path) -> None:
    (tmp_path / "w").write_text("1 " * 101)
    with pytest.raises(
        DistTrainError, match=r"^data\.sampling=balanced and data\.sample_weights=.* Keep one of them\.$"
    ):
        load(sampling="balanced", sample_weights=tmp_path / "w")
    with pytest.raises(DistTrainError, match=r"^data\.sample_weights=.*/nowhere: no such file\. Give the path of"):
        load(sample_weights=tmp_path / "nowhere")


def test_other_weights_are_other_data(tmp_path: Path) -> None:
    """At a resume, and between ranks."""
    path = tmp_path / "w"
    path.write_text("1 " * 101)
    before = load(sample_weights=path).fingerprints
    assert differences(load(sample_weights=path).fingerprints, before) == []
    path.write_text("1 " * 100 + "2")
    ((split, now, _),) = differences(load(sample_weights=path).fingerprints, before)
    assert (split, now.partition(" checksum")[0]) == ("train", "sample weights with")
