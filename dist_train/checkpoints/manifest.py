"""The checkpoints of a run: which exist, which are good (complete, with the checksums of their manifest), the best."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from dist_train.atomic_files import read_json, remove
from dist_train.checkpoints.contents import FORMAT, MANIFEST, MODEL, STATE, TRAINING
from dist_train.errors import CheckpointError
from dist_train.runs.directory import RunDir, step_of

LINKS = ("last", "best")  # for users; this code never reads them
REMOVING = ".removing_"  # name prefix of a checkpoint that is being deleted

_log = logging.getLogger(__name__)


def folder_of(run_dir: RunDir, step: int) -> Path:
    return run_dir.checkpoints / f"step_{step:08d}"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a manifest. Return {} if it is missing, unreadable or damaged: its checksum covers all other entries."""
    manifest = read_json(folder / MANIFEST)
    return manifest if manifest.pop("sha256", None) == digest(manifest) else {}


def manifests(run_dir: RunDir) -> dict[Path, dict[str, Any]]:
    """Return the manifests of this run's checkpoints by folder, newest first. The other files are not checked."""
    run_id = run_dir.run_id
    by_folder = {folder: read_manifest(folder) for folder in run_dir.step_folders()}
    return {folder: each for folder, each in by_folder.items() if each and not _mismatch(folder, each, run_id)}


def run_id_from_checkpoints(run_dir: RunDir) -> str | None:
    """Return the run id from the newest manifest that has one, for a run whose other files are lost."""
    return next(filter(None, (each.get("run") for each in manifests(run_dir).values())), None)


def find_damage(folder: Path, run_id: str | None = None) -> str:
    """Return what is wrong with a checkpoint, "" if it is good. `run_id` None accepts any run."""
    manifest = read_manifest(folder)
    if not manifest:
        return f"{MANIFEST} is missing or damaged"
    if manifest.get("format") != FORMAT:
        return f"format {manifest.get('format')}, expected {FORMAT}"
    if mismatch := _mismatch(folder, manifest, run_id):
        return mismatch
    for name, expected in manifest["files"].items():
        try:
            actual = fingerprint(folder / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if actual != expected:
            return f"{name} has {actual['bytes']} bytes of {expected['bytes']} and another SHA-256 than recorded"
    return ""


def _mismatch(folder: Path, manifest: dict[str, Any], run_id: str | None) -> str:
    """Return why an intact manifest does not belong to `folder`, or "". Manifests of older versions name no run."""
    if manifest.get("step") != step_of(folder) or set(manifest.get("files", ())) != {MODEL, TRAINING, STATE}:
        return f"{MANIFEST} belongs to another checkpoint"
    if run_id and manifest.get("run") not in (None, run_id):
        return f"{MANIFEST} belongs to run {manifest['run']}, this is run {run_id}"
    return ""


def good_checkpoints(run_dir: RunDir, *, set_aside: bool = False) -> Iterator[Path]:
    """Yield the good checkpoints, newest first. With `set_aside`, rename damaged ones and log a warning."""
    if set_aside:
        recover_interrupted_replace(run_dir.checkpoints)  # a kill may have come between the two renames
        for path in _foreign_entries(run_dir.checkpoints):
            _log.warning("%s is not a checkpoint of this run: ignored", path)
    folders, run_id = run_dir.step_folders(), run_dir.run_id
    for folder in folders:
        damage = find_damage(folder, run_id)
        if not damage:
            yield folder
        elif set_aside:
            renamed = folder.with_name(f"damaged_{folder.name}")
            remove(renamed)
            folder.rename(renamed)
            then = "the previous one is used" if folder != folders[-1] else "none is left, the run starts over"
            _log.warning("checkpoint %s is damaged (%s): moved to %s, %s", folder, damage, renamed.name, then)


def _foreign_entries(parent: Path) -> list[Path]:
    """Return what users have put next to the checkpoints, a copy under another name for example."""
    paths = sorted(parent.iterdir()) if parent.is_dir() else []
    return [path for path in paths if step_of(path) is None and path.name not in LINKS and path.name[0] != "."]


def by_score(by_folder: dict[Path, dict[str, Any]]) -> list[Path]:
    """Return the checkpoints whose manifest has a score, best first; among equal scores the earlier step first."""
    scored = [folder for folder, manifest in by_folder.items() if manifest.get("score") is not None]
    return sorted(scored, key=lambda folder: (-by_folder[folder]["score"], by_folder[folder]["step"]))


def best_checkpoint(run_dir: RunDir) -> Path | None:
    """Return the checkpoint with the best score, or None if none has a score."""
    return next(iter(by_score(manifests(run_dir))), None)


def find_checkpoint(run_dir: RunDir, which: str) -> Path:
    """Return the good checkpoint `last`, `best` or of a step number.

    Raises:
        CheckpointError: no such good checkpoint; lists the available steps.
    """
    good = list(good_checkpoints(run_dir))
    steps = {read_manifest(path)["step"]: path for path in good}
    path = {"last": good[0] if good else None, "best": best_checkpoint(run_dir)}.get(which)
    if which.isdigit():
        path = steps.get(int(which))
    if path is None or path not in good:
        names = ", ".join(map(str, sorted(steps))) or "none"
        raise CheckpointError(f"No good checkpoint {which} in {run_dir.checkpoints}. Available steps: {names}.")
    return path


def digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def recover_interrupted_replace(parent: Path) -> None:
    """Finish an interrupted replacement: delete the old checkpoint if the new one exists, else rename it back."""
    for replaced in parent.glob(".replaced_*"):
        folder = parent / replaced.name.removeprefix(".replaced_")
        if folder.exists():
            remove(replaced)
        else:
            replaced.rename(folder)


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint. It is renamed first: after a kill, nothing would remove half of one under its own name."""
    renamed = folder.with_name(f"{REMOVING}{folder.name}")
    remove(renamed)
    with suppress(OSError):
        folder.rename(renamed)
    remove(renamed)
