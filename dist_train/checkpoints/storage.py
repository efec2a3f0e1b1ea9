"""Writing (rank zero, only I/O) and restoring (all ranks) a checkpoint. contents.py describes its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from dist_train.atomic_files import atomic_write, remove_leftovers, write_json
from dist_train.checkpoints.contents import FORMAT, MANIFEST, MODEL, STATE, TRAINING, Snapshot, TrainerState
from dist_train.checkpoints.manifest import REMOVING, digest, fingerprint, recover_interrupted_replace
from dist_train.checkpoints.weights import header_of, load_into, read_weights
from dist_train.distributed.devices import is_out_of_memory
from dist_train.errors import CheckpointError


class Stateful(Protocol):
    """What a checkpoint saves and restores: the nets and everything that determines their further training."""

    @property
    def net(self) -> nn.Module: ...

    @property
    def ema(self) -> nn.Module | None: ...

    @property
    def evaluated_net(self) -> nn.Module: ...

    def is_finite(self) -> bool: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def write(
    snapshot: Snapshot,
    folder: Path,
    attempt: int,
    run_id: str | None = None,
    before_rename: Callable[[], None] = lambda: None,
) -> None:
    """Write a snapshot to `folder`. Only rank zero calls it; no collective, may be called from a thread.

    If `before_rename` raises, nothing is changed.
    """
    state = snapshot.state
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent)
    remove_leftovers(folder.parent, REMOVING)

    def move_existing() -> None:
        before_rename()
        if folder.exists():  # a run that resumed there and stopped before its next step saves the same step again
            folder.rename(folder.with_name(f".replaced_{folder.name}"))

    try:
        with atomic_write(folder, before_rename=move_existing) as temporary:
            temporary.mkdir()
            weights = {name: weight.contiguous() for name, weight in snapshot.model.items()}
            save_file(weights, str(temporary / MODEL), header_of(snapshot.model))
            torch.save(snapshot.training, temporary / TRAINING)
            write_json(temporary / STATE, asdict(state), durable=False)
            manifest = {
                "format": FORMAT,
                "step": state.step,
                **({"run": run_id} if run_id else {}),
                "attempt": attempt,
                # Only if these weights were evaluated.
                "metrics": state.val if state.val.get("step") == state.step else {},
                "score": state.score,
                "files": {name: fingerprint(temporary / name) for name in (MODEL, TRAINING, STATE)},
            }
            write_json(temporary / MANIFEST, {**manifest, "sha256": digest(manifest)}, durable=False)
    except (RuntimeError, SafetensorError) as error:  # torch and safetensors raise these on a full disk
        raise CheckpointError(str(error)) from error
    finally:
        recover_interrupted_replace(folder.parent)


def restore(folder: Path, step: Stateful) -> TrainerState:
    """Load a verified checkpoint into `step`. Every rank reads the files itself."""
    try:
        model = read_weights(folder / MODEL)
        training = torch.load(folder / TRAINING, map_location="cpu", weights_only=True)
        state = TrainerState(**json.loads((folder / STATE).read_text()))
    except (OSError, ValueError, TypeError, RuntimeError, EOFError, UnpicklingError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    training.setdefault("net", model)
    try:
        step.load_state_dict(training)
    except Exception as error:  # modules of the net may raise any exception
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{folder} does not fit {type(step.net).__name__}: {error}. If the code of the net has changed, undo that, "
            f"or choose another --run-name."
        ) from error
    return state


def load_weights(net: nn.Module, folder: Path) -> None:
    """Load the weights of a checkpoint into a net, without optimizer or training state.

    Raises:
        CheckpointError: the weights are unreadable, or of another net.
    """
    try:
        load_into(net, read_weights(folder / MODEL))
    except Exception as error:  # modules of the net may raise any exception
        raise CheckpointError(f"{folder / MODEL} does not fit {type(net).__name__}: {error}") from None
