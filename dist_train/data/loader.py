"""Loader workers: a DataLoader whose examples depend on (seed, epoch, index) alone, and that only its parent stops."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from dist_train.data.image_set import Examples, ImageSet
from dist_train.errors import UserCodeError
from dist_train.generators import seed_everything
from dist_train.seeding import derive_seed

Key = tuple[int, int]  # (epoch, index): what a loader worker needs to make an example
Made = tuple[Any, Any, Tensor]  # inputs, targets and indices of a batch, on the CPU


def loader_of(
    examples: Examples, keys: Iterable[list[Key]], num_workers: int, device: torch.device, seed: int
) -> DataLoader[Any]:
    """Makes the batches of `keys`, ahead of time, pinned where the device is a GPU; open it with `stream`."""
    return DataLoader(
        Seeded(examples, seed),
        batch_sampler=keys,
        num_workers=num_workers,
        collate_fn=_Collate(examples),
        worker_init_fn=_heed_only_the_parent,
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

    def __getitem__(self, key: Key) -> tuple[int, Any]:
        epoch, index = key
        if self.draws:
            seed_everything(derive_seed(self.seed, "example", epoch, index))
        return index, self.examples[index]


class _Collate:
    """The data set's own `collate(batch)` inside ours, which keeps the indices beside it."""

    def __init__(self, examples: Examples) -> None:
        self.collate: Callable[[list[Any]], Any] = getattr(examples, "collate", default_collate)

    def __call__(self, items: list[tuple[int, Any]]) -> tuple[Any, Any, Tensor]:
        made = self.collate([item for _, item in items])
        if not isinstance(made, (tuple, list)) or len(made) != 2:
            raise UserCodeError(
                f"A batch must be two things, (inputs, targets); found {_kind_of(made)}. Make each example a pair, or "
                f"give the data set a method collate(batch) that returns one."
            )
        return made[0], made[1], torch.tensor([index for index, _ in items])


def _kind_of(made: Any) -> str:
    return f"{len(made)} in a {type(made).__name__}" if isinstance(made, (tuple, list)) else type(made).__name__


# What stops a run is sent to whole process groups (torchrun) or jobs (Slurm), and so to the loader workers too.
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def stream(loader: DataLoader[Any]) -> Iterator[Made]:
    """Iterate, with workers that only their parent can stop: the ranks agree on a stop and need batches until then.

    Blocked while the workers are forked, the signals are so in them from their first moment on.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _heed_only_the_parent(_worker: int) -> None:
    """In a worker: TERM from the parent, which ends workers so, ends it; the blocked signals of others do not."""
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return

    def wait() -> None:
        while True:
            told = signal.sigwaitinfo(_STOP_SIGNALS)
            if told.si_signo == signal.SIGTERM and told.si_pid == os.getppid():
                os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
