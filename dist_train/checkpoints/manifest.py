"""Which checkpoints a run has, and whether they are good: complete, as their manifest says, by checksums.

A checkpoint is `checkpoints/step_00001200/` with

    model.safetensors  the weights that count (averaged ones with ema_decay)
    training.pt        optimizer, scaler, the raw weights beside averaged ones, window sums; read without executing code
    state.json         step, best result, clocks
    manifest.json      step, run, metrics, and size and SHA-256 of the three and of itself; written last
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from dist_train.atomic_files import read_json, remove
from dist_train.errors import CheckpointError
from dist_train.runs.directory import RunDir, step_of

FORMAT = 1
MODEL, TRAINING, STATE, MANIFEST = "model.safetensors", "training.pt", "state.json", "manifest.json"
LINKS = ("last", "best")  # for people, never read
REMOVING = ".removing_"  # what the name of a checkpoint begins with that is on its way out

_log = logging.getLogger(__name__)


def folder_of(run_dir: RunDir, step: int) -> Path:
    return run_dir.checkpoints / f"step_{step:08d}"


def read_manifest(folder: Path) -> dict[str, Any]:
    """{} where it is missing, unreadable or damaged: its checksum covers all other entries."""
    manifest = read_json(folder / MANIFEST)
    return manifest if manifest.pop("sha256", None) == digest(manifest) else {}


def manifests(run_dir: RunDir) -> dict[Path, dict[str, Any]]:
    """By the checkpoint's folder, newest first: of those that are this run's, whether their files are right or not."""
    run_id = run_dir.run_id
    found = {folder: read_manifest(folder) for folder in run_dir.step_folders()}
    return {folder: each for folder, each in found.items() if each and not _mismatch(folder, each, run_id)}


def run_id_by_checkpoints(run_dir: RunDir) -> str | None:
    """Of the newest that says it: for a run whose other files are lost."""
    return next(filter(None, (each.get("run") for each in manifests(run_dir).values())), None)


def find_damage(folder: Path, run_id: str | None = None) -> str:
    """What is wrong with a checkpoint, "" if it is good. `run_id` None: of whichever run."""
    manifest = read_manifest(folder)
    if not manifest:
        return f"{MANIFEST} is missing or damaged"
    if manifest.get("format") != FORMAT:
        return f"format {manifest.get('format')} is not {FORMAT}"
    if mismatch := _mismatch(folder, manifest, run_id):
        return mismatch
    for name, expected in manifest["files"].items():
        try:
            found = fingerprint(folder / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found != expected:
            return f"{name} has {found['bytes']} bytes of {expected['bytes']} and another SHA-256 than written"
    return ""


def _mismatch(folder: Path, manifest: dict[str, Any], run_id: str | None) -> str:
    """Why a whole manifest is not that of the checkpoint in `folder`; those of older versions name no run."""
    if manifest.get("step") != step_of(folder) or set(manifest.get("files", ())) != {MODEL, TRAINING, STATE}:
        return f"{MANIFEST} belongs to another checkpoint"
    if run_id and manifest.get("run") not in (None, run_id):
        return f"{MANIFEST} belongs to run {manifest['run']}, and this is {run_id}"
    return ""


def good_checkpoints(run_dir: RunDir, *, set_aside: bool = False) -> Iterator[Path]:
    """The good checkpoints, newest first. `set_aside`: move damaged ones out of the way and say so."""
    if set_aside:
        recover_interrupted_replace(run_dir.checkpoints)  # a kill may have come between the two renames
        for path in _strangers(run_dir.checkpoints):
            _log.warning("%s is no checkpoint of this run: left alone", path)
    folders, run_id = run_dir.step_folders(), run_dir.run_id
    for folder in folders:
        damage = find_damage(folder, run_id)
        if not damage:
            yield folder
        elif set_aside:
            aside = folder.with_name(f"damaged_{folder.name}")
            remove(aside)
            folder.rename(aside)
            then = "the one before is used" if folder != folders[-1] else "none is left, the run begins anew"
            _log.warning("checkpoint %s is damaged (%s): moved to %s, %s", folder, damage, aside.name, then)


def _strangers(parent: Path) -> list[Path]:
    """What somebody has put beside the checkpoints, a copy under a name of his own for example."""
    there = sorted(parent.iterdir()) if parent.is_dir() else []
    return [path for path in there if step_of(path) is None and path.name not in LINKS and path.name[0] != "."]


def by_score(found: dict[Path, dict[str, Any]]) -> list[Path]:
    """Of these manifests those that have a score, the best first; of equal ones the earlier."""
    scored = [path for path, manifest in found.items() if manifest.get("score") is not None]
    return sorted(scored, key=lambda path: (-found[path]["score"], found[path]["step"]))


def best_checkpoint(run_dir: RunDir) -> Path | None:
    """The checkpoint with the best score, None where none has one."""
    return next(iter(by_score(manifests(run_dir))), None)


def find_checkpoint(run_dir: RunDir, which: str) -> Path:
    """`last`, `best` or a step number.

    Raises:
        CheckpointError: no such good checkpoint; lists those there are.
    """
    there = list(good_checkpoints(run_dir))
    steps = {read_manifest(path)["step"]: path for path in there}
    found = {"last": there[0] if there else None, "best": best_checkpoint(run_dir)}.get(which)
    if which.isdigit():
        found = steps.get(int(which))
    if found is None or found not in there:
        names = ", ".join(map(str, sorted(steps))) or "none"
        raise CheckpointError(f"No good checkpoint {which} in {run_dir.checkpoints}. Steps there: {names}.")
    return found


def digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def recover_interrupted_replace(parent: Path) -> None:
    """A checkpoint that was being replaced: away if the new one is there, else back in its place."""
    for replaced in parent.glob(".replaced_*"):
        folder = parent / replaced.name.removeprefix(".replaced_")
        if folder.exists():
            remove(replaced)
        else:
            replaced.rename(folder)


def remove_checkpoint(folder: Path) -> None:
    """Renamed first: a kill leaves no half of a checkpoint under its name, which nothing would ever remove."""
    aside = folder.with_name(f"{REMOVING}{folder.name}")
    remove(aside)
    with suppress(OSError):
        folder.rename(aside)
    remove(aside)
