"""Loader workers: a DataLoader whose examples depend on (seed, epoch, index) alone, and that only its parent stops."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.queues import Queue
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from dist_train.data.sets.image_set import Examples, ImageSet, example_at, form_of, name_of, origin
from dist_train.distributed.devices import is_out_of_memory
from dist_train.distributed.rng import derive_seed, seed_everything
from dist_train.errors import DataError, DistTrainError, UserCodeError
from dist_train.user_code.importing import user_code_error

ExampleKey = tuple[int, int]  # (epoch, index): what a loader worker needs to make an example
LoadedBatch = tuple[Any, Any, Tensor]  # inputs, targets and indices of a batch, on the CPU


def loader_of(
    examples: Examples, keys: Iterable[list[ExampleKey]], num_workers: int, device: torch.device, seed: int
) -> DataLoader[Any]:
    """Makes the batches of `keys`, ahead of time, pinned where the device is a GPU; open it with `stream`."""
    return DataLoader(
        _Batches(examples, seed),
        sampler=keys,
        batch_size=None,  # an item of ours is a batch
        num_workers=num_workers,
        collate_fn=_as_it_is,
        worker_init_fn=_begin,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if num_workers else None,
        persistent_workers=num_workers > 0,
    )


class Seeded(Dataset[Any]):
    """Makes each example under seeds from (seed, epoch, index).

    So random transforms of user code give the same example whatever the number of workers and ranks, and after any
    resume.
    """

    def __init__(self, examples: Examples, seed: int) -> None:
        self.examples = examples
        self.seed = seed
        self.draws = not isinstance(examples, ImageSet)

    def __getitem__(self, key: ExampleKey) -> tuple[int, Any]:
        """
        Raises:
            UserCodeError: as `example_at`.
        """
        epoch, index = key
        if self.draws:
            seed_everything(derive_seed(self.seed, "example", epoch, index))
        return index, example_at(self.examples, index)


class _Batches(Dataset[Any]):
    """A batch for a list of keys; or why there is none, as a value: of an error that a worker raises DataLoader would
    send the traceback as its message."""

    def __init__(self, examples: Examples, seed: int) -> None:
        self._seeded = Seeded(examples, seed)
        self._collate = _Collate(examples)

    def __getitem__(self, keys: list[ExampleKey]) -> LoadedBatch | DistTrainError:
        try:
            with _translate_loader_errors():
                return self._collate([self._seeded[key] for key in keys])
        except DistTrainError as error:
            return error


def _as_it_is(made: Any) -> Any:
    return made


def loader_error(error: BaseException) -> DataError | None:
    """What DataLoader and torch's shared memory have to say of loader workers; None if `error` is of something else.

    That a worker is gone may be raised anywhere: by the handler of a signal.
    """
    if not isinstance(error, RuntimeError):
        return None
    said = " ".join(str(error).split()).rstrip(".")
    if "Too many open files" in said or "items of ancdata" in said:
        return _too_many_files()
    if "out of shared memory" in said or "</torch_" in said:
        return _too_little_shared_memory()
    if "DataLoader worker" in said:
        return DataError(
            f"A loader worker is gone: {said}. If it was killed, memory or /dev/shm ran out: lower data.num_workers or "
            f"enlarge /dev/shm (docker run --shm-size=8g). If not, data.num_workers=0 shows more of it."
        )
    return None


def _too_many_files() -> DataError:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return DataError(
        f"Too many open files: a process may have {limit}, and every tensor that a loader worker hands over is one "
        f"until it was used. Raise the limit (ulimit -n 65536), or lower data.num_workers."
    )


def _too_little_shared_memory() -> DataError:
    size = ""
    with suppress(OSError):
        size = f", {shutil.disk_usage('/dev/shm').total // 1024:,} KiB in all,"
    return DataError(
        f"Loader workers hand batches over in shared memory, and /dev/shm{size} has no room for them. Enlarge it "
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
    except OSError as error:  # by multiprocessing: those of the user's code are told already
        if error.errno == errno.EMFILE:
            raise _too_many_files() from error
        if error.errno == errno.ENOSPC:
            raise _too_little_shared_memory() from error
        raise
    except EOFError as error:  # the worker had no more files to send one by
        raise _too_many_files() from error


class _Collate:
    """The data set's own `collate(batch)`, else torch's, inside ours, which keeps the indices beside it."""

    def __init__(self, examples: Examples) -> None:
        self._examples = examples
        self._own: Callable[[list[Any]], Any] | None = getattr(examples, "collate", None)

    def __call__(self, items: list[tuple[int, Any]]) -> LoadedBatch:
        """
        Raises:
            UserCodeError: there is no batch of these examples, or one that leaves some of them out.
        """
        indices, batch = [index for index, _ in items], [example for _, example in items]
        try:
            made = (self._own or default_collate)(batch)
        except DistTrainError:
            raise
        except Exception as error:
            if is_out_of_memory(error) or loader_error(error):
                raise
            raise self._blame(error, indices, batch) from error
        if not isinstance(made, (tuple, list)) or len(made) != 2:
            raise UserCodeError(
                f"A batch must be two things, (inputs, targets); found {_kind_of(made)}. Make each example a pair, or "
                f"give the data set a method collate(batch) that returns one."
            )
        inputs, targets = made
        count = _count(targets, len(items))
        if count is not None and count < len(items):
            raise UserCodeError(
                f"{self._name}.collate made {count} targets of {len(items)} examples ({self._places(indices)}). Those "
                f"that it leaves out would count as seen: leave them out of the data set itself, so that len() and "
                f"the indices are of examples that there are. For a net that needs no targets make them None."
            )
        return inputs, targets, torch.tensor(indices)

    def _blame(self, error: Exception, indices: list[int], batch: list[Any]) -> UserCodeError:
        if self._own is not None:
            return user_code_error(f"{self._name}.collate failed on examples {self._places(indices)}", error)
        forms = [form_of(example) for example in batch]
        other = next((number for number, form in enumerate(forms) if form != forms[0]), 0)
        shown = [f"{name_of(self._examples, indices[number])} is {forms[number]}" for number in sorted({0, other})]
        return UserCodeError(
            f"torch cannot put these into one batch: {'; '.join(shown)} ({' '.join(str(error).split())}). Make them "
            f"tensors of one shape in __getitem__, or give {self._name} a method collate(batch)."
        )

    @property
    def _name(self) -> str:
        return type(origin(self._examples, 0)[0]).__name__

    def _places(self, indices: list[int]) -> str:
        places = [str(origin(self._examples, index)[1]) for index in indices[:_NAMED]]
        return ", ".join([*places, *["..."] * (len(indices) > _NAMED)])


_NAMED = 8  # examples of a batch, in an error


def _count(targets: Any, wanted: int) -> int | None:
    """Of how many examples these are, by the length of the first tensor or of a list; None if they do not tell."""
    if isinstance(targets, Mapping):
        return next((_count(item, wanted) for item in targets.values()), None)
    if isinstance(targets, (list, tuple)) and targets:
        # One for each example, or one for each of several tasks.
        return max(len(targets), _count(targets[0], wanted) or 0)
    shape = getattr(targets, "shape", ())
    return wanted if wanted in shape[:2] else next(iter(shape), None)  # time may come first: [T, B]


def _kind_of(made: Any) -> str:
    return f"{len(made)} in a {type(made).__name__}" if isinstance(made, (tuple, list)) else type(made).__name__


# What stops a run is sent to whole process groups (torchrun) or jobs (Slurm), and so to the loader workers too.
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def stream(loader: DataLoader[Any]) -> Iterator[LoadedBatch]:
    """Iterate, with workers that only their parent can stop: the ranks agree on a stop and need batches until then.

    Blocked while the workers are forked, the signals are so in them from their first moment on.

    Raises:
        UserCodeError: an example or a batch cannot be made.
        DataError: a worker is gone, or cannot hand over what it has made.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        with _translate_loader_errors():
            batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return _received(batches)


def _received(batches: Iterator[LoadedBatch | DistTrainError]) -> Iterator[LoadedBatch]:
    while True:
        with _translate_loader_errors():
            made = next(batches, None)
        if made is None:
            return
        if isinstance(made, DistTrainError):
            try:
                raise made
            finally:
                del made  # else error and frame would hold each other, and the workers: an exit waits 5 s for each
        yield made


def _begin(_worker: int) -> None:
    """In a worker, before its first batch."""
    Queue._on_queue_feeder_error = _tell_parent  # type: ignore[attr-defined]
    _heed_only_the_parent()


def _tell_parent(queue: Queue[Any], error: Exception, item: tuple[int, Any]) -> None:
    """In place of a batch that could not be handed over, why: a queue by itself drops it, and the parent waits on."""
    number, _made = item
    try:
        with _translate_loader_errors():
            raise error
    except DistTrainError as found:
        queue.put((number, found))
    except Exception:
        queue.put((number, user_code_error("A batch cannot be handed over by a loader worker", error)))


def _heed_only_the_parent() -> None:
    """In a worker: TERM from the parent, which ends workers so, ends it; the blocked signals of others do not."""
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return

    def wait() -> None:
        while True:
            told = signal.sigwaitinfo(_STOP_SIGNALS)
            if told.si_signo == signal.SIGTERM and told.si_pid == os.getppid():
                os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
