"""A checkpoint on the disk: write (rank zero, pure I/O) and restore (all ranks). manifest.py says what lies in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from dist_train.atomic_files import atomic_write, remove_leftovers, write_json
from dist_train.checkpoints.manifest import (
    FORMAT,
    MANIFEST,
    MODEL,
    REMOVING,
    STATE,
    TRAINING,
    digest,
    fingerprint,
    recover_interrupted_replace,
)
from dist_train.checkpoints.train_state import TrainState
from dist_train.checkpoints.weights import header_of, load_into, read_weights
from dist_train.distributed.devices import is_out_of_memory
from dist_train.errors import CheckpointError


class Stateful(Protocol):
    """What is saved and restored: nets, and all that decides how their training goes on."""

    @property
    def net(self) -> nn.Module: ...

    @property
    def ema(self) -> nn.Module | None: ...

    @property
    def evaluated_net(self) -> nn.Module: ...

    def is_finite(self) -> bool: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Snapshot:
    """A copy of everything on the CPU: training may go on while it is written."""

    state: TrainState
    model: dict[str, Tensor]
    training: dict[str, Any]


def write(
    snapshot: Snapshot,
    folder: Path,
    attempt: int,
    run_id: str | None = None,
    before_rename: Callable[[], None] = lambda: None,
) -> None:
    """Write a snapshot to `folder`. Rank zero alone; no collective, callable from a thread.

    What `before_rename` raises leaves all as it was.
    """
    state = snapshot.state
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent)
    remove_leftovers(folder.parent, REMOVING)

    def make_room() -> None:
        before_rename()
        if folder.exists():  # a run resumed there and stopped before its next step saves the same step again
            folder.rename(folder.with_name(f".replaced_{folder.name}"))

    try:
        with atomic_write(folder, before_rename=make_room) as aside:
            aside.mkdir()
            weights = {name: weight.contiguous() for name, weight in snapshot.model.items()}
            save_file(weights, str(aside / MODEL), header_of(snapshot.model))
            torch.save(snapshot.training, aside / TRAINING)
            write_json(aside / STATE, asdict(state), durable=False)
            manifest = {
                "format": FORMAT,
                "step": state.step,
                **({"run": run_id} if run_id else {}),
                "attempt": attempt,
                # Only of an evaluation of these very weights.
                "metrics": state.val if state.val.get("step") == state.step else {},
                "score": state.score,
                "files": {name: fingerprint(aside / name) for name in (MODEL, TRAINING, STATE)},
            }
            write_json(aside / MANIFEST, {**manifest, "sha256": digest(manifest)}, durable=False)
    except (RuntimeError, SafetensorError) as error:  # what torch and safetensors make of a full disk
        raise CheckpointError(str(error)) from error
    finally:
        recover_interrupted_replace(folder.parent)


def restore(folder: Path, step: Stateful) -> TrainState:
    """Load a checkpoint that was verified. Every rank reads it for itself."""
    try:
        model = read_weights(folder / MODEL)
        training = torch.load(folder / TRAINING, map_location="cpu", weights_only=True)
        state = TrainState(**json.loads((folder / STATE).read_text()))
    except (OSError, ValueError, TypeError, RuntimeError, EOFError, UnpicklingError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    training.setdefault("net", model)
    try:
        step.load_state_dict(training)
    except Exception as error:  # of whatever kind the net's own modules raise
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{folder} does not fit {type(step.net).__name__}: {error}. Was the code of the net changed since? "
            f"Undo that, or start under another --run-name."
        ) from error
    return state


def load_weights(net: nn.Module, folder: Path) -> None:
    """The weights of a checkpoint into a bare net.

    Raises:
        CheckpointError: unreadable, or of another net.
    """
    try:
        load_into(net, read_weights(folder / MODEL))
    except Exception as error:  # of whatever kind the net's own modules raise
        raise CheckpointError(f"{folder / MODEL} does not fit {type(net).__name__}: {error}") from None
