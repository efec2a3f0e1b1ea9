"""Random damage to checkpoints of a real run: reported and set aside; the newest good one is loaded."""

from __future__ import annotations

import copy
import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.checkpoints import manager as checkpoints
from dist_train.checkpoints import storage as checkpoint
from dist_train.checkpoints.manager import Checkpoints
from dist_train.checkpoints.manifest import find_damage
from dist_train.config.loading import parse_config
from dist_train.config.schema import Config
from dist_train.data.splits import load_splits
from dist_train.distributed.world import World
from dist_train.runs.directory import RunDir
from dist_train.training.build import build_components
from dist_train.training.step.train_step import Step
from support.damages import DAMAGES, FILES, Damage, delete, flip_bits, manifest_of_another, truncate, zero_a_block
from support.processes import DIST_TRAIN
from support.ranks import run_forked, train_on_ranks
from support.run_files import assert_bit_identical, assert_equal, metrics_without_times, optimizer_state, status_of

TABLE = "damaged checkpoints and mutated input"
COLUMNS = ("fault", "cases", "outcome")

SETTINGS: dict[str, Any] = {
    "data": {"name": "support.user_sets:Jittered"}, "model": {"name": "support.user_sets:WithDropout"},
    "global_batch_size": 16, "train_for": "26 steps", "log_every": 1, "eval_every": "8 steps", "save_every": "4 steps",
    "keep_last": 9, "ema_decay": 0.9, "device": "cpu", "tracking": {"wandb": "disabled"},
}  # fmt: skip
STOPPED_AT = 22  # with checkpoints at 4, 8, 12, 16, 20 and 22


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stopped") / "run"
    train_on_ranks(SETTINGS, path, stop_after=STOPPED_AT)
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    train_on_ranks(SETTINGS, path)
    return path


def damage_newest(folders: list[Path], damage: Damage, rng: random.Random) -> dict[Path, set[str]]:
    """Damage the newest checkpoints, mostly one or two, sometimes all. Return the damaged files by checkpoint."""
    victims = folders[: rng.choice([1, 1, 1, 2, 2, 3, len(folders)])]
    intact = folders[0].parent.with_name("intact")  # files of other checkpoints are taken from undamaged copies
    others = {folder: [intact / other.name for other in folders if other != folder] for folder in victims}
    return {folder: damage(folder, others[folder], rng) for folder in victims}


def swap_between_two(folders: list[Path], rng: random.Random) -> dict[Path, set[str]]:
    """Swap one or two files between the newest checkpoint and an older one."""
    newest, older = folders[0], rng.choice(folders[1:])
    names = set(rng.sample(FILES, rng.choice([1, 1, 2])))
    for name in names:
        (newest / name).rename(newest / "between")
        (older / name).rename(newest / name)
        (newest / "between").rename(older / name)
    return {newest: names, older: names}


# --- in this process, through the functions that a resume calls ------------------------------------------------------


class Resumes:
    """Repeats what a start of the run does with its checkpoints."""

    def __init__(self, stopped: Path, folder: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config: Config = parse_config(SETTINGS)
        self.world, self.folder = world, folder
        self.step: Step = build_components(self.config, world, load_splits(self.config.data, 0)).step
        shutil.copytree(stopped / "checkpoints", folder / "intact", symlinks=True)
        self.loaded: list[Path] = []
        restore = checkpoint.restore

        def recording(path: Path, step: Step) -> Any:
            self.loaded.append(path)
            return restore(path, step)

        monkeypatch.setattr(checkpoints, "restore", recording)
        self.contents = {path.name: self._contents_of(path.name) for path in self.new_folders()}
        assert len(self.contents) == 6

    def new_folders(self) -> list[Path]:
        """Reset the run's checkpoints to undamaged copies and return them, newest first."""
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        shutil.copytree(self.folder / "intact", self.folder / "checkpoints", symlinks=True)
        return sorted((self.folder / "checkpoints").glob("step_*"), reverse=True)

    def restore(self) -> int | None:
        """Return the step that a start would resume from, None for a new start."""
        self.loaded.clear()
        with torch.no_grad():
            for parameter in (*self.step.net.parameters(), *self.step.evaluated_net.parameters()):
                parameter.fill_(7.0)  # so that the old values cannot pass for loaded ones
        manager = Checkpoints(RunDir(self.folder), self.world, self.config, 0)
        state = manager.restore_latest(self.step)
        manager.close()
        return state.step if state is not None else None

    def _contents_of(self, name: str) -> Any:
        for folder in self.new_folders():
            if folder.name > name:
                shutil.rmtree(folder)
        assert self.restore() == int(name.removeprefix("step_"))
        return copy.deepcopy(self.step.state_dict())


@pytest.fixture
def resumes(stopped: Path, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> Resumes:
    return Resumes(stopped, tmp_path, world, monkeypatch)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check(resumes: Resumes, folders: list[Path], damaged: dict[Path, set[str]], messages: list[str]) -> Path | None:
    """Check every guarantee of one resume. Return the checkpoint that was loaded."""
    for folder in folders:
        damage = find_damage(folder)
        assert bool(damage) == (folder in damaged), f"{folder.name}: {damage or 'nothing found'}"
        assert not damage or any(name in damage for name in damaged[folder]), f"{damage}: not {damaged[folder]}"
    expected = next((folder for folder in folders if folder not in damaged), None)
    skipped = folders[: folders.index(expected)] if expected else folders  # the damaged ones that are newer
    before = {folder: files_of(folder) for folder in folders}

    step = resumes.restore()
    if expected is None:
        assert step is None
        assert resumes.loaded == []
    else:
        assert resumes.loaded == [expected]
        assert step == int(expected.name.removeprefix("step_"))
        assert_equal(resumes.step.state_dict(), resumes.contents[expected.name])
    for folder in folders:
        renamed = folder.with_name(f"damaged_{folder.name}")
        assert (renamed.exists(), folder.exists()) == (folder in skipped, folder not in skipped), folder.name
        assert files_of(renamed if folder in skipped else folder) == before[folder]  # nothing is deleted
    assert len(messages) == len(skipped)
    for folder, message in zip(skipped, messages, strict=True):
        assert str(folder) in message
        assert f"damaged_{folder.name}" in message
        assert any(name in message for name in damaged[folder]), message
        assert message.endswith("the run starts over" if folder == folders[-1] else "the previous one is used")
    return expected


def try_all(resumes: Resumes, inject: Callable[[list[Path], random.Random], Any], what: str, how_many: int) -> str:
    """Inject `how_many` faults, one after the other. Return a summary of the outcomes."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("dist_train")
    logger.addHandler(handler)
    set_aside = none_left = 0
    try:
        for number in range(how_many):
            rng, folders = random.Random(f"{what} {number}"), resumes.new_folders()
            damaged = inject(folders, rng)
            messages.clear()
            try:
                none_left += check(resumes, folders, damaged, messages) is None
            except AssertionError as error:
                files = {folder.name: sorted(names) for folder, names in damaged.items()}
                raise AssertionError(f'Damage "{what} {number}" of {files}: {error}') from error
            set_aside += len(messages)
    finally:
        logger.removeHandler(handler)
    return (
        f"{set_aside} damaged checkpoints reported and set aside; the newest good one loaded "
        f"{how_many - none_left} times, none left {none_left} times"
    )


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_checkpoint_is_never_loaded(
    what: str, resumes: Resumes, count: Callable[[int], int], row: Callable[..., None]
) -> None:
    damage, full = DAMAGES[what]
    outcome = try_all(resumes, lambda folders, rng: damage_newest(folders, damage, rng), what, count(full))
    row(what, count(full), outcome)


def test_swapped_checkpoint_files_are_never_loaded(
    resumes: Resumes, count: Callable[[int], int], row: Callable[..., None]
) -> None:
    what = "1 or 2 files swapped between two checkpoints"
    row(what, count(60), try_all(resumes, swap_between_two, what, count(60)))


# --- end to end, as a user restarts a run ----------------------------------------------------------------------------


def test_resume_after_damage_equals_undisturbed_run(
    stopped: Path, undisturbed: Path, tmp_path: Path, count: Callable[[int], int], row: Callable[..., None]
) -> None:
    damages = [flip_bits, truncate, manifest_of_another, delete, zero_a_block]
    shutil.copytree(stopped / "checkpoints", tmp_path / "run" / "intact", symlinks=True)
    for number, damage in enumerate(damages[: count(len(damages))]):
        path = tmp_path / "run" / f"{number}"
        shutil.copytree(stopped, path, symlinks=True)
        folders = sorted((path / "checkpoints").glob("step_*"), reverse=True)[: 1 + number % 2]
        others = [tmp_path / "run" / "intact" / "step_00000004"]
        for folder in folders:
            damage(folder, others, random.Random(f"{damage.__name__} {number}"))
        done = run_forked([*DIST_TRAIN, "train", "-q", "--resume", str(path)], tmp_path)
        assert done.returncode == 0, f"{damage.__name__} {number}: {done.stdout}{done.stderr}"
        assert done.stdout.count("is damaged") == len(folders)
        assert {folder.name for folder in folders} == {
            renamed.name.removeprefix("damaged_") for renamed in (path / "checkpoints").glob("damaged_*")
        }
        assert_bit_identical(path, undisturbed)
    row("`dist-train train` restarted after one of these", count(len(damages)), "weights and metrics to the bit")


def test_resume_with_foreign_folders_and_damaged_records(
    stopped: Path, undisturbed: Path, tmp_path: Path, row: Callable[..., None]
) -> None:
    """The run was copied with links followed, has a user's copy of a checkpoint, and two damaged record files."""
    path = shutil.copytree(stopped, tmp_path / "run")
    shutil.copytree(path / "checkpoints/step_00000008", path / "checkpoints/step_backup")
    lines = (path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (path / "metrics.jsonl").write_bytes(b"".join([*lines[:2], lines[2].replace(b'"', b"\xff"), *lines[3:]]))
    status = json.loads((path / "status.json").read_text())
    (path / "status.json").write_text(json.dumps(status | {"attempt": None, "reached": float("inf")}))
    done = run_forked([*DIST_TRAIN, "train", "-q", "--resume", str(path)], tmp_path)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    for text in ("status.json is damaged: attempt=None, reached=inf", "step_backup is not a checkpoint", "in line 3: "):
        assert (done.stdout + done.stderr).count(text) == 1
    assert_equal(optimizer_state(path), optimizer_state(undisturbed))
    expected = metrics_without_times(undisturbed)
    assert metrics_without_times(path) == [*expected[:2], *expected[3:]]
    assert status_of(path)["attempt"] == 2
    row("run copied with links followed, a copied checkpoint, `metrics.jsonl` and `status.json` damaged", 1,
        "reported; to the bit except for the damaged line")  # fmt: skip
