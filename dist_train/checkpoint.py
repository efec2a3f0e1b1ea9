"""A checkpoint on the disk: write (rank zero, pure I/O), restore (all ranks), verify, find.

A checkpoint is `checkpoints/step_00001200/` with

    model.safetensors  the weights that count (averaged ones with ema_decay)
    training.pt        optimizer, scaler, the raw weights beside averaged ones, window sums; read without executing code
    state.json         step, best result, clocks
    manifest.json      step, metrics, and size and SHA-256 of the three and of itself; written last

It is complete or absent: written aside, synced, then renamed. Good means complete, checksums right and finite.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dist_train.errors import CheckpointError
from dist_train.run_dir import RunDir, read_json, write_json
from dist_train.step import Step
from dist_train.train_state import TrainState, score_of

FORMAT = 1
MODEL, TRAINING, STATE, MANIFEST = "model.safetensors", "training.pt", "state.json", "manifest.json"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """A copy of everything on the CPU: training may go on while it is written."""

    state: TrainState
    model: dict[str, Tensor]
    training: dict[str, Any]


def folder_of(run_dir: RunDir, step: int) -> Path:
    return run_dir.checkpoints / f"step_{step:08d}"


def step_folders(run_dir: RunDir) -> list[Path]:
    """Newest first."""
    return sorted(run_dir.checkpoints.glob("step_*"), reverse=True)


def write(snapshot: Snapshot, folder: Path, attempt: int) -> None:
    """Write a snapshot to `folder`. Rank zero alone; no collective, callable from a thread.

    Order: the files, each synced; the manifest; the folder; the rename; the parent folder.
    """
    state = snapshot.state
    folder.parent.mkdir(parents=True, exist_ok=True)
    for stale in folder.parent.glob(".writing_*"):
        remove(stale)  # what a kill left behind
    aside = folder.parent / f".writing_{folder.name}"
    aside.mkdir()
    try:
        save_file({name: weight.contiguous() for name, weight in snapshot.model.items()}, str(aside / MODEL))
        torch.save(snapshot.training, aside / TRAINING)
        write_json(aside / STATE, asdict(state), durable=False)
        for name in (MODEL, TRAINING, STATE):
            _sync(aside / name)
        manifest = {
            "format": FORMAT,
            "step": state.step,
            "attempt": attempt,
            # Only of an evaluation of these very weights.
            "metrics": state.val if state.val.get("step") == state.step else {},
            "score": score_of(state.val) if state.val.get("step") == state.step else None,
            "files": {name: _fingerprint(aside / name) for name in (MODEL, TRAINING, STATE)},
        }
        write_json(aside / MANIFEST, {**manifest, "sha256": _digest(manifest)})
        _sync(aside)
        if folder.exists():  # a run resumed there and stopped before its next step saves the same step again
            folder.rename(folder.with_name(f".replaced_{folder.name}"))
        aside.rename(folder)
        _sync(folder.parent)
    except (RuntimeError, SafetensorError) as error:  # what torch and safetensors make of a full disk
        raise CheckpointError(str(error)) from error
    finally:
        remove(aside)  # gone already if all went well
        _settle(folder.parent)


def _settle(parent: Path) -> None:
    """A checkpoint that was being replaced: away if the new one is there, else back in its place."""
    for replaced in parent.glob(".replaced_*"):
        folder = parent / replaced.name.removeprefix(".replaced_")
        if folder.exists():
            remove(replaced)
        else:
            replaced.rename(folder)


def restore(folder: Path, step: Step) -> TrainState:
    """Load a checkpoint that was verified. Every rank reads it for itself."""
    try:
        model = load_file(str(folder / MODEL))
        training = torch.load(folder / TRAINING, map_location="cpu", weights_only=True)
        state = TrainState(**json.loads((folder / STATE).read_text()))
    except (OSError, ValueError, TypeError, RuntimeError, EOFError, UnpicklingError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    training.setdefault("net", model)
    try:
        step.load_state_dict(training)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
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
        net.load_state_dict(load_file(str(folder / MODEL)))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder / MODEL} does not fit {type(net).__name__}: {error}") from None


def read_manifest(folder: Path) -> dict[str, Any]:
    """{} where it is missing, unreadable or damaged: its checksum covers all other entries."""
    manifest = read_json(folder / MANIFEST)
    return manifest if manifest.pop("sha256", None) == _digest(manifest) else {}


def find_damage(folder: Path) -> str:
    """What is wrong with a checkpoint, "" if it is good."""
    manifest = read_manifest(folder)
    if not manifest:
        return f"{MANIFEST} is missing or damaged"
    if manifest.get("format") != FORMAT:
        return f"format {manifest.get('format')} is not {FORMAT}"
    if folder.name != f"step_{manifest.get('step'):08d}" or set(manifest["files"]) != {MODEL, TRAINING, STATE}:
        return f"{MANIFEST} belongs to another checkpoint"
    for name, expected in manifest["files"].items():
        try:
            found = _fingerprint(folder / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found != expected:
            return f"{name} has {found['bytes']} bytes of {expected['bytes']} and another SHA-256 than written"
    return ""


def good(run_dir: RunDir, *, check: bool = True, set_aside: bool = False) -> Iterator[Path]:
    """The good checkpoints, newest first. `set_aside`: move damaged ones out of the way and say so."""
    if set_aside:
        _settle(run_dir.checkpoints)  # a kill may have come between the two renames
    for folder in step_folders(run_dir):
        damage = find_damage(folder) if check else "" if read_manifest(folder) else "no manifest"
        if not damage:
            yield folder
        elif set_aside:
            aside = folder.with_name(f"damaged_{folder.name}")
            remove(aside)
            folder.rename(aside)
            _log.warning(
                "checkpoint %s is damaged (%s): moved to %s, the one before is used", folder, damage, aside.name
            )


def best(run_dir: RunDir) -> Path | None:
    """The checkpoint with the best score, None where none has one."""
    scores = {path: read_manifest(path).get("score") for path in step_folders(run_dir)}
    scored = {path: score for path, score in scores.items() if score is not None}
    return max(sorted(scored), key=lambda path: scored[path]) if scored else None  # of equal ones the first


def find_checkpoint(run_dir: RunDir, which: str) -> Path:
    """`last`, `best` or a step number.

    Raises:
        CheckpointError: no such good checkpoint; lists those there are.
    """
    there = list(good(run_dir))
    steps = {read_manifest(path)["step"]: path for path in there}
    found = {"last": there[0] if there else None, "best": best(run_dir)}.get(which)
    if which.isdigit():
        found = steps.get(int(which))
    if found is None or found not in there:
        names = ", ".join(map(str, sorted(steps))) or "none"
        raise CheckpointError(f"No good checkpoint {which} in {run_dir.checkpoints}. Steps there: {names}.")
    return found


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
