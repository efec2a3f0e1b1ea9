"""Loader workers whose examples depend on the seed and their key alone and that only their parent can stop."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing.queues import Queue
from typing import Any

import torch
from torch import Tensor
from torch._C import _error_if_any_worker_fails
from torch.utils.data import DataLoader, Dataset, default_collate

from dist_train.data.sets.image_set import (
    Examples,
    ImageSet,
    describe_example,
    describe_value,
    example_at,
    locate,
    name_of,
)
from dist_train.distributed.devices import is_out_of_memory
from dist_train.distributed.import_lock import IMPORT_LOCK
from dist_train.distributed.rng import derive_seed, seed_everything
from dist_train.errors import DataError, DistTrainError, UserCodeError
from dist_train.user_code.importing import user_code_error

# What a loader worker needs to make an example: (epoch, index), or (epoch, place in the epoch's order, index) where an
# epoch may hold an example more than once.
ExampleKey = tuple[int, ...]
LoadedBatch = tuple[Any, Any, Tensor]  # inputs, targets and indices of a batch, on the CPU


def make_loader(
    examples: Examples, keys: Iterable[Sequence[ExampleKey]], num_workers: int, device: torch.device, seed: int
) -> DataLoader[Any]:
    """Return a DataLoader that prefetches the batches of `keys`, pinned for a GPU; iterate over it with `stream`."""
    return DataLoader(
        _Batches(examples, seed),
        sampler=keys,
        batch_size=None,  # an item is a batch already
        num_workers=num_workers,
        collate_fn=_identity,
        worker_init_fn=_init_worker,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if num_workers else None,
        persistent_workers=num_workers > 0,
    )


class SeededExamples(Dataset[Any]):
    """Makes each example with the generators seeded from the run's seed and its key.

    Random transforms of user code thus give the same example for any number of workers and ranks and after any resume.
    """

    def __init__(self, examples: Examples, seed: int) -> None:
        self.examples = examples
        self.seed = seed
        self.draws = not isinstance(examples, ImageSet)

    def __getitem__(self, key: ExampleKey) -> tuple[int, Any]:
        """
        Raises:
            UserCodeError: see `example_at`.
        """
        if self.draws:
            seed_everything(derive_seed(self.seed, "example", *key))
        index = key[-1]
        return index, example_at(self.examples, index)


class _Batches(Dataset[Any]):
    """Maps a list of keys to a batch or to an error value: DataLoader replaces the message of an error that a worker
    raises by its traceback."""

    def __init__(self, examples: Examples, seed: int) -> None:
        self._seeded = SeededExamples(examples, seed)
        self._collate = _Collate(examples)

    def __getitem__(self, keys: Sequence[ExampleKey]) -> LoadedBatch | DistTrainError:
        try:
            with _translate_loader_errors():
                return self._collate([self._seeded[key] for key in keys])
        except DistTrainError as error:
            return error


def _identity(batch: Any) -> Any:
    return batch


def loader_error(error: BaseException) -> DataError | None:
    """Translate an error of DataLoader or of torch's shared memory; None if `error` has another cause.

    A signal handler reports a dead worker, so that error may be raised anywhere.
    """
    if not isinstance(error, RuntimeError):
        return None
    message = " ".join(str(error).split()).rstrip(".")
    if "Too many open files" in message or "items of ancdata" in message:
        return _too_many_files()
    if "out of shared memory" in message or "</torch_" in message:
        return _shared_memory_full()
    if "DataLoader worker" in message:
        return DataError(
            f"A loader worker died: {message}. If it was killed, memory or /dev/shm ran out: lower data.num_workers or "
            f"enlarge /dev/shm (docker run --shm-size=8g). Otherwise set data.num_workers=0 to see the cause."
        )
    return None


def _too_many_files() -> DataError:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return DataError(
        f"Too many open files: the limit per process is {limit}, and each tensor from a loader worker is one open "
        f"file until it is used. Raise the limit (ulimit -n 65536), or lower data.num_workers."
    )


def _shared_memory_full() -> DataError:
    size = ""
    with suppress(OSError):
        size = f" ({shutil.disk_usage('/dev/shm').total // 1024:,} KiB in total)"
    return DataError(
        f"Loader workers send batches through shared memory, and /dev/shm{size} has too little space. Enlarge it "
        f"(docker run --shm-size=8g), or set data.num_workers=0."
    )


@contextmanager
def _translate_loader_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if loader_error(error) is None:
            raise
        raise loader_error(error) from error  # type: ignore[misc]
    except OSError as error:  # from multiprocessing: those of user code are translated already
        if error.errno == errno.EMFILE:
            raise _too_many_files() from error
        if error.errno == errno.ENOSPC:
            raise _shared_memory_full() from error
        if died := _death_of_worker():
            raise died from error
        raise
    except EOFError as error:  # else the worker had no file descriptor left to send a tensor with
        raise (_death_of_worker() or _too_many_files()) from error


def _death_of_worker() -> DataError | None:
    """Return the error of a worker that died. Its sockets are closed a moment before its death can be seen."""
    try:
        for _ in range(200):
            _error_if_any_worker_fails()
            time.sleep(0.01)
    except RuntimeError as error:
        return loader_error(error)
    return None


class _Collate:
    """Collates with the data set's own `collate(batch)`, else torch's, and adds the indices."""

    def __init__(self, examples: Examples) -> None:
        self._examples = examples
        self._own: Callable[[list[Any]], Any] | None = getattr(examples, "collate", None)

    def __call__(self, items: list[tuple[int, Any]]) -> LoadedBatch:
        """
        Raises:
            UserCodeError: the examples cannot be collated, or the batch omits some of them.
        """
        indices, batch = [index for index, _ in items], [example for _, example in items]
        try:
            collated = (self._own or default_collate)(batch)
        except DistTrainError:
            raise
        except Exception as error:
            if is_out_of_memory(error) or loader_error(error):
                raise
            raise self._collate_error(error, indices, batch) from error
        if not isinstance(collated, (tuple, list)) or len(collated) != 2:
            raise UserCodeError(
                f"A batch must be a pair (inputs, targets), found {_kind_of(collated)}. Return each example as a pair, "
                f"or give the data set a method collate(batch) that returns one."
            )
        inputs, targets = collated
        count = _count(targets, len(items))
        if count is not None and count < len(items):
            raise UserCodeError(
                f"{self._name}.collate made {count} targets of {len(items)} examples ({self._positions(indices)}). "
                f"Omitted examples would count as seen: remove them from the data set itself, so that len() and "
                f"the indices cover only valid examples. For a net that needs no targets, return None as targets."
            )
        return inputs, targets, torch.tensor(indices)

    def _collate_error(self, error: Exception, indices: list[int], batch: list[Any]) -> UserCodeError:
        if self._own is not None:
            return user_code_error(f"{self._name}.collate failed on examples {self._positions(indices)}", error)
        forms = [describe_value(example) for example in batch]
        other = next((number for number, form in enumerate(forms) if form != forms[0]), 0)
        shown = [
            f"{describe_example(self._examples, indices[number])} is {forms[number]}" for number in sorted({0, other})
        ]
        return UserCodeError(
            f"torch cannot collate these examples: {'; '.join(shown)} ({' '.join(str(error).split())}). Return "
            f"tensors of one shape from __getitem__, or give {self._name} a method collate(batch)."
        )

    @property
    def _name(self) -> str:
        return name_of(self._examples)

    def _positions(self, indices: list[int]) -> str:
        positions = [str(locate(self._examples, index)[1]) for index in indices[:_NAMED]]
        return ", ".join([*positions, *["..."] * (len(indices) > _NAMED)])


_NAMED = 8  # examples of a batch named in an error


def _count(targets: Any, wanted: int) -> int | None:
    """Return the number of examples, from the length of a list or of the first tensor; None if unknown."""
    if isinstance(targets, Mapping):
        return next((_count(item, wanted) for item in targets.values()), None)
    if isinstance(targets, (list, tuple)) and targets:
        # One item per example, or one per task.
        return max(len(targets), _count(targets[0], wanted) or 0)
    shape = getattr(targets, "shape", ())
    return wanted if wanted in shape[:2] else next(iter(shape), None)  # time may come first: [T, B]


def _kind_of(batch: Any) -> str:
    return f"{len(batch)} in a {type(batch).__name__}" if isinstance(batch, (tuple, list)) else type(batch).__name__


# Stop signals go to whole process groups (torchrun) or jobs (Slurm), and so reach the loader workers too.
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def stream(loader: DataLoader[Any]) -> Iterator[LoadedBatch]:
    """Iterate with workers that only their parent can stop: ranks need batches until they agree on a stop.

    The signals are blocked during the fork, so the workers start with them blocked.

    Raises:
        UserCodeError: an example or a batch cannot be made.
        DataError: a worker died, or cannot send its batch.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        with _translate_loader_errors(), IMPORT_LOCK if loader.num_workers else nullcontext():
            batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return _received(batches)


def _received(batches: Iterator[LoadedBatch | DistTrainError]) -> Iterator[LoadedBatch]:
    while True:
        with _translate_loader_errors():
            batch = next(batches, None)
        if batch is None:
            return
        if isinstance(batch, DistTrainError):
            try:
                raise batch
            finally:
                del batch  # break the cycle of error and frame: it keeps workers alive, and an exit waits 5 s for each
        yield batch


def _init_worker(_worker: int) -> None:
    """Initialise a worker before its first batch."""
    Queue._on_queue_feeder_error = _report_to_parent  # type: ignore[attr-defined]
    _ignore_foreign_signals()


def _report_to_parent(queue: Queue[Any], error: Exception, item: tuple[int, Any]) -> None:
    """Send the error in place of a batch that cannot be sent: the queue would drop it, and the parent wait forever."""
    number, _made = item
    try:
        with _translate_loader_errors():
            raise error
    except DistTrainError as found:
        queue.put((number, found))
    except Exception:
        queue.put((number, user_code_error("A loader worker cannot send a batch", error)))


def _ignore_foreign_signals() -> None:
    """Exit on TERM from the parent, which ends workers this way, and ignore the blocked signals of other senders."""
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return

    def wait() -> None:
        while True:
            received = signal.sigwaitinfo(_STOP_SIGNALS)
            if received.si_signo == signal.SIGTERM and received.si_pid == os.getppid():
                os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
