"""Batches are the same with and without loader workers; each error is one line that names the example."""

from __future__ import annotations

import importlib
import os
import re
import signal
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from dist_train.data.batches import ToDevice
from dist_train.data.loader import LoadedBatch, loader_error, make_loader, stream
from dist_train.data.sets.image_set import Examples, Subset, locate, subset_of
from dist_train.distributed.import_lock import IMPORT_LOCK
from dist_train.errors import DataError, UserCodeError
from support.ranks import run_on_ranks

CPU = torch.device("cpu")
WORKERS = pytest.mark.parametrize("num_workers", [0, 2])


class Twenty(Dataset[Any]):
    """Twenty examples; number 13 is the result of `odd`."""

    def __init__(self, odd: Callable[[], Any], length: int = 20) -> None:
        self.odd = odd
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        if index == 13:
            return self.odd()
        return torch.full((1, 4, 4), float(range(20)[index])), index % 3


def fetch(examples: Examples, num_workers: int = 0, indices: list[int] | None = None) -> list[LoadedBatch]:
    """Load the examples in batches of four."""
    indices = list(range(20)) if indices is None else indices
    keys = [[(0, index) for index in indices[start : start + 4]] for start in range(0, len(indices), 4)]
    return list(stream(make_loader(examples, keys, num_workers, CPU, seed=0)))


def error_of(examples: Examples, num_workers: int = 0, **more: Any) -> str:
    message = ""
    try:  # not pytest.raises: its result holds the frame, and so the workers, until garbage collection
        fetch(examples, num_workers, **more)
    except (UserCodeError, DataError) as error:
        message = str(error)
    assert message
    assert "\n" not in message
    assert "Traceback" not in message
    return message


def corrupt() -> Any:
    raise OSError("image file is truncated")


@WORKERS
def test_failing_example_is_named(num_workers: int) -> None:
    here = __file__.replace(".", r"\.")
    expected = rf"Example 13 of Twenty cannot be made: {here}:\d+: OSError: image file is truncated\."
    assert re.fullmatch(expected, error_of(Twenty(corrupt), num_workers))


def test_origin_of_nested_subset() -> None:
    inner = Subset([7, 8, 9, 10], torch.tensor([3, 2, 1]))
    assert locate(Subset(inner, range(3)), 1) == ([7, 8, 9, 10], 2)


def test_example_is_named_by_its_index_in_original_set() -> None:
    """Held-out validation examples have another index."""
    part = subset_of(Twenty(corrupt), torch.tensor([5, 6, 7, 13]))
    assert error_of(part, indices=[0, 1, 2, 3]).startswith("Example 13 of Twenty cannot be made")


@WORKERS
def test_too_large_length_is_reported(num_workers: int) -> None:
    message = error_of(Twenty(lambda: (torch.zeros(1, 4, 4), 0), length=24), num_workers, indices=list(range(24)))
    assert message.startswith("Example 20 of Twenty cannot be made: ")
    assert message.endswith("Its len() is 24: is that too large?")


@WORKERS
@pytest.mark.parametrize(
    ("odd", "form"),
    [
        (lambda: (torch.zeros(1, 5, 4), 0), r"\(float32 \[1, 5, 4\], int\)"),
        (lambda: None, "NoneType"),
        (lambda: (object(), 0), r"\(object, int\)"),
        (lambda: (torch.zeros(1, 4, 4), 0, 0), r"\(float32 \[1, 4, 4\], int, int\)"),
    ],
    ids=["another size", "nothing", "no tensor", "one more"],
)
def test_examples_that_cannot_be_collated_are_shown(odd: Callable[[], Any], form: str, num_workers: int) -> None:
    expected = rf"Example 12 of Twenty is \(float32 \[1, 4, 4\], int\); Example 13 of Twenty is {form} \("
    assert re.search(expected, error_of(Twenty(odd), num_workers))


def test_uncollatable_type_suggests_collate_method() -> None:
    message = error_of(Twenty(lambda: (object(), 0)), indices=[13])
    assert "Example 13 of Twenty is (object, int) (default_collate: batch must contain tensors" in message
    assert "give Twenty a method collate(batch)" in message


class Collated(Twenty):
    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        super().__init__(lambda: (torch.zeros(1, 4, 4), -1))
        self.collate = collate


def without_the_odd(targets: Callable[[Tensor], Any]) -> Callable[[list[Any]], Any]:
    def collate(batch: list[Any]) -> Any:
        images, labels = default_collate([example for example in batch if example[1] >= 0])
        return images, targets(labels)

    return collate


@WORKERS
@pytest.mark.parametrize(
    "targets",
    [lambda y: y, lambda y: {"label": y}, lambda y: y.tolist(), lambda y: [y, y], lambda y: [{"boxes": y}, {"b": y}]],
    ids=["labels", "dict", "numbers", "tasks", "list of dicts"],
)
def test_collate_that_drops_examples_is_refused(targets: Callable[[Tensor], Any], num_workers: int) -> None:
    message = error_of(Collated(without_the_odd(targets)), num_workers)
    assert "Twenty" not in message
    assert message.startswith("Collated.collate made 3 targets of 4 examples (12, 13, 14, 15).")


def test_dummy_targets_are_refused_with_fix() -> None:
    """A training without targets is tested by `test_net_trains_without_targets`."""
    message = error_of(Collated(lambda batch: (default_collate(batch)[0], torch.zeros(1))))
    assert message.startswith("Collated.collate made 1 targets of 4 examples (0, 1, 2, 3).")
    assert message.endswith("For a net that needs no targets, return None as targets.")


@pytest.mark.parametrize(
    "targets",
    [
        lambda y: torch.cat([y, y]),
        lambda y: torch.zeros(3, 4),
        lambda y: (torch.zeros(40), y),
        lambda y: [{"boxes": torch.zeros(1)}] * 4,
        lambda y: ["a"] * 4,
        lambda y: None,
    ],
    ids=["two views", "time first", "tokens and lengths", "one dict each", "texts", "none"],
)
def test_other_target_counts_are_accepted(targets: Callable[[Tensor], Any]) -> None:
    def collate(batch: list[Any]) -> Any:
        images, labels = default_collate(batch)
        return images, targets(labels)

    assert [len(indices) for *_, indices in fetch(Collated(collate))] == [4] * 5


@WORKERS
def test_failing_collate_is_located(num_workers: int) -> None:
    def collate(batch: list[Any]) -> Any:
        return default_collate(batch) if batch[0][0].max() < 10 else batch[7]

    message = error_of(Collated(collate), num_workers)
    assert message.startswith(f"Collated.collate failed on examples 12, 13, 14, 15: {__file__}:")
    assert message.endswith("IndexError: list index out of range.")


# --- workers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGBUS, signal.SIGKILL])
def test_killed_worker_is_reported(number: int) -> None:
    run_on_ranks(lose_a_worker, number, world_size=1)  # a separate process: torch raises from a signal handler


def lose_a_worker(number: int) -> None:
    try:
        message = error_of(Twenty(lambda: os.kill(os.getpid(), number)), num_workers=2)
    except RuntimeError as error:  # from the signal handler
        message = str(loader_error(error))
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the end of the other worker would raise the error again
    assert "/dev/shm" in message
    assert "data.num_workers" in message


def test_dying_worker_is_reported() -> None:
    """Its files are closed a moment before its death can be seen: then its batches can no longer be fetched."""
    run_on_ranks(fetch_late, world_size=1)


def fetch_late() -> None:
    def die() -> None:
        time.sleep(1)  # its batch before this one is on its way
        os.closerange(3, 256)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    keys = [[(0, index) for index in range(start, start + 4)] for start in range(0, 20, 4)]
    batches = stream(make_loader(Twenty(die), keys, 2, CPU, seed=0))
    next(batches)
    time.sleep(1.2)
    with pytest.raises(DataError, match="A loader worker died"):
        list(batches)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the end of the other worker would raise the error again


def test_unpicklable_batch_is_reported_without_waiting() -> None:
    """By default the queue's thread drops the batch."""
    assert "A loader worker cannot send a batch" in error_of(Collated(lambda batch: (lambda: 0, [0] * 4)), 2)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("unable to write to file </torch_7_8_9>: No space left on device (28)", "--shm-size"),
        ("unable to open shared memory object </torch_7_8> in read-write mode: Too many open files (24)", "ulimit -n"),
        ("received 0 items of ancdata", "ulimit -n"),
        ("mat1 and mat2 shapes cannot be multiplied", None),
    ],
)
def test_shared_memory_errors_name_fix(message: str, expected: str | None) -> None:
    found = loader_error(RuntimeError(message))
    assert (found is None) if expected is None else expected in str(found)
    assert loader_error(ValueError(message)) is None


# --- the structure of inputs -------------------------------------------------------------------------------------

Inputs = namedtuple("Inputs", "image mask")


class Held(dict[str, Any]):
    """A mapping with state besides its items, which cannot be built from a dict."""

    def __init__(self, note: str) -> None:
        super().__init__()
        self.note = note


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_keep_their_structure(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        held = Held("mine")
        held["image"], held["ids"] = torch.ones(2), torch.tensor([1, 2])
        given = Inputs([torch.ones(2)], {"both": (held, "text")})
        found = ToDevice(None, CPU)((given, torch.zeros(2), torch.arange(2))).inputs
    finally:
        torch.set_default_dtype(torch.float32)
    assert isinstance(found, Inputs)
    again, text = found.mask["both"]
    assert (type(again), again.note, text) == (Held, "mine", "text")
    assert (found.image[0].dtype, again["image"].dtype, again["ids"].dtype) == (dtype, dtype, torch.int64)


class Importing(Dataset[Any]):
    """Its example needs a module."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[float, int]:
        return float(importlib.import_module("long_import").VALUE), index


@pytest.mark.timeout(60)  # a worker that waits for ever is not noticed before
def test_workers_start_before_or_after_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is forked in the middle of an import would wait for ever for that module."""
    (tmp_path / "long_import.py").write_text("import time\ntime.sleep(0.5)\nVALUE = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    begun = threading.Event()

    def load() -> None:
        with IMPORT_LOCK:
            begun.set()
            importlib.import_module("long_import")

    thread = threading.Thread(target=load)
    thread.start()
    begun.wait()
    ((values, _labels, _indices),) = fetch(Importing(), num_workers=1, indices=[0])
    assert values.tolist() == [3]
    thread.join()
    del sys.modules["long_import"]
