"""Checkpoints: snapshot (all ranks) -> write (rank zero, pure I/O) -> restore (all ranks); verify and prune.

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
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dist_train.config import Config
from dist_train.distributed import World
from dist_train.errors import CheckpointError, TrainingDiverged
from dist_train.run_dir import RunDir, read_json, write_json
from dist_train.schedule import is_due
from dist_train.step import Step

FORMAT = 1
MODEL, TRAINING, STATE, MANIFEST = "model.safetensors", "training.pt", "state.json", "manifest.json"

_log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Where the run is, as plain numbers. The learning rate and the data order follow from `step`."""

    step: int = 0
    logged_step: int = 0  # of the last `train` line: losses up to here were finite
    evaluation_pending: bool = False  # a stop cut it short: done again after the resume
    val: dict[str, float] = field(default_factory=dict)  # the last evaluation: val/loss, val/accuracy, ..., its step
    best: dict[str, float] = field(default_factory=dict)  # the best one
    gain_from: float | None = None  # the score that early stopping compares with
    evaluations_without_gain: int = 0
    train_s: float = 0.0  # seconds inside training steps, over all attempts
    total_s: float = 0.0  # seconds since the process started, over all attempts

    @property
    def is_best(self) -> bool:
        return bool(self.best) and self.best["step"] == self.step

    def note_evaluation(self, metrics: dict[str, float], min_delta: float) -> None:
        """Remember an evaluation done at `step` (keys val/...)."""
        self.evaluation_pending = False
        self.val = {**metrics, "step": self.step}
        score = score_of(metrics)
        if not self.best or score > score_of(self.best):
            self.best = self.val
        if self.gain_from is None or score > self.gain_from + min_delta:
            self.gain_from, self.evaluations_without_gain = score, 0
        else:
            self.evaluations_without_gain += 1


def score_of(metrics: dict[str, float]) -> float:
    """Higher is better: accuracy where it can be counted, else the negative loss."""
    return metrics.get("val/accuracy", -metrics["val/loss"])


@dataclass(frozen=True)
class Snapshot:
    """A copy of everything on the CPU: training may go on while it is written."""

    state: TrainState
    model: dict[str, Tensor]
    training: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run. Rank zero writes, in the background, one at a time."""

    def __init__(self, run_dir: RunDir, world: World, config: Config, keep_every_steps: int) -> None:
        self.run_dir = run_dir
        self.world = world
        self._keep_last, self._keep_best, self._keep_every = config.keep_last, config.keep_best, keep_every_steps
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._failure = ""
        self.saved_step = -1

    def snapshot(self, state: TrainState, step: Step) -> Snapshot:
        """Collective: every rank must call this.

        Raises:
            TrainingDiverged: on every rank, if weights or losses are not finite; a poisoned state is never saved.
        """
        if not step.is_finite():
            raise TrainingDiverged(
                f"Weights or losses are not finite between step {state.logged_step + 1} and {state.step}. "
                f"The last good checkpoint is {self.describe_last()}. Lower optimizer.lr or set max_grad_norm."
            )
        training = step.state_dict()
        net = training.pop("net")
        if step.ema is not None:
            training["net"] = net
        model = step.evaluated_net.state_dict()
        if not self.world.is_rank_zero:
            return Snapshot(state, {}, {})
        return Snapshot(TrainState(**asdict(state)), _copy_to_cpu(model), _copy_to_cpu(training))

    def save(self, state: TrainState, step: Step) -> None:
        """Snapshot now, write in the background. A failed write is a warning: the next save tries again.

        Collective: every rank must call this.
        """
        snapshot = self.snapshot(state, step)
        self.saved_step = state.step
        if not self.world.is_rank_zero:
            return
        self._await()
        self.run_dir.sync_metrics()
        self._pending = self._writer.submit(self._commit, snapshot)

    def finish(self) -> None:
        """Wait for the write under way.

        Collective: every rank must call this.

        Raises:
            CheckpointError: on every rank, if the last write failed.
        """
        self._await()
        failure = self.world.from_rank_zero(self._failure)
        if failure:
            raise CheckpointError(failure)

    def close(self) -> None:
        self._writer.shutdown(wait=True)

    def _await(self) -> None:
        if self._pending is None:
            return
        started = time.perf_counter()
        try:
            self._pending.result()
            self._failure = ""
        except (OSError, CheckpointError) as error:
            self._failure = (
                f"A checkpoint could not be written to {self.run_dir.checkpoints}: {error}. Make room there; "
                f"the last good checkpoint is {self.describe_last()}."
            )
            _log.warning("%s Training goes on, the next save tries again.", self._failure)
        self._pending = None
        if (waited := time.perf_counter() - started) > 0.05:
            _log.info("waited %.2f s until a checkpoint was written", waited)

    def _commit(self, snapshot: Snapshot) -> None:
        self.run_dir.check_not_superseded()
        write(snapshot, folder_of(self.run_dir, snapshot.state.step), attempt=self.run_dir.attempt)
        self._prune()
        self._link()

    def describe_last(self) -> str:
        last = next(iter(good(self.run_dir)), None)
        return str(last) if last else "none"

    # --- keeping -------------------------------------------------------------------------------------------------

    def _prune(self) -> None:
        """Delete what no rule keeps. The one just written is good, so an older one may go."""
        manifests = {path: read_manifest(path) for path in step_folders(self.run_dir)}  # newest first
        complete = [path for path, manifest in manifests.items() if manifest]
        keep = set(complete[: self._keep_last])
        scored = [path for path in complete if manifests[path].get("score") is not None]
        scored.sort(key=lambda path: manifests[path]["score"], reverse=True)
        keep |= set(scored[: self._keep_best])
        if self._keep_every:
            keep |= {path for path in complete if is_due(manifests[path]["step"], self._keep_every, -1)}
        for path in set(complete) - keep:
            _remove(path)

    def _link(self) -> None:
        """`last` and `best` for people; the code never reads them."""
        names = {"last": next(iter(good(self.run_dir, check=False)), None), "best": best(self.run_dir)}
        for name, target in names.items():
            if target is not None:
                temporary = self.run_dir.checkpoints / f".{name}"
                temporary.unlink(missing_ok=True)
                temporary.symlink_to(target.name)
                temporary.replace(self.run_dir.checkpoints / name)

    # --- restoring -----------------------------------------------------------------------------------------------

    def restore_latest(self, step: Step) -> TrainState | None:
        """Load the newest good checkpoint into `step`. A damaged one is named and set aside.

        Collective: every rank must call this.
        """
        name = ""
        if self.world.is_rank_zero:
            name = next((path.name for path in good(self.run_dir, set_aside=True)), "")
        name = self.world.from_rank_zero(name)
        return restore(self.run_dir.checkpoints / name, step) if name else None


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
        _remove(stale)  # what a kill left behind
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
        _remove(aside)  # gone already if all went well
        _settle(folder.parent)


def _settle(parent: Path) -> None:
    """A checkpoint that was being replaced: away if the new one is there, else back in its place."""
    for replaced in parent.glob(".replaced_*"):
        folder = parent / replaced.name.removeprefix(".replaced_")
        if folder.exists():
            _remove(replaced)
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
            _remove(aside)
            folder.rename(aside)
            _log.warning(
                "checkpoint %s is damaged (%s): moved to %s, the one before is used", folder, damage, aside.name
            )


def best(run_dir: RunDir) -> Path | None:
    """The checkpoint with the best score, None where none has one."""
    scores = {path: read_manifest(path).get("score") for path in step_folders(run_dir)}
    scored = {path: score for path, score in scores.items() if score is not None}
    return max(scored, key=lambda path: scored[path]) if scored else None


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


def _copy_to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)  # strides and all: fused Adam walks state and weights side by side
    if isinstance(value, dict):
        return {key: _copy_to_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copy_to_cpu(item) for item in value)
    return value


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


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
