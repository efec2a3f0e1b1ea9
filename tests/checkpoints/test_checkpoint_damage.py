"""Any damage to a checkpoint is detected and reported; the checkpoint is set aside and the previous one is used."""

from __future__ import annotations

import json
import logging
import random
import shutil
from pathlib import Path

import pytest

from dist_train.checkpoints.contents import MANIFEST, MODEL
from dist_train.checkpoints.manifest import (
    find_checkpoint,
    find_damage,
    folder_of,
    good_checkpoints,
    manifests,
    read_manifest,
    run_id_from_checkpoints,
)
from dist_train.config.loading import load_config, parse_config
from dist_train.errors import CheckpointError, ConfigError, RunDirError
from dist_train.runs.attempt import begin_attempt
from dist_train.runs.directory import RunDir
from dist_train.runs.start_options import StartOptions, check_start
from support import damages
from support.tiny_runs import write_at


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = RunDir(tmp_path_factory.mktemp("run"))
    for step in (1, 2):
        write_at(run_dir, step, accuracy=step / 10)
    return run_dir.path


@pytest.fixture
def run_dir(template: Path, tmp_path: Path) -> RunDir:
    shutil.copytree(template, tmp_path / "run")
    return RunDir(tmp_path / "run")


def flip_a_bit_of_the_manifest(newest: Path, _: list[Path], chance: random.Random) -> set[str]:
    content = bytearray((newest / MANIFEST).read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    (newest / MANIFEST).write_bytes(content)
    return {MANIFEST}


def odd_manifest(newest: Path, _: list[Path], chance: random.Random) -> set[str]:
    """Remove an entry, change its type, or replace the whole manifest."""
    manifest = json.loads((newest / MANIFEST).read_text())
    wrong: list[object] = [None, 7, "2", [], {}, {"files": 1}, {"bytes": 1}]
    key = chance.choice([*manifest, "whole"])
    if key == "whole":
        manifest = chance.choice(wrong)
    elif chance.random() < 0.3:
        del manifest[key]
    elif key == "files" and chance.random() < 0.7:
        manifest["files"][chance.choice([MODEL, "another"])] = chance.choice(wrong)
    else:
        manifest[key] = chance.choice(wrong)
    (newest / MANIFEST).write_text(json.dumps(manifest))
    return {MANIFEST}


REPETITIONS: dict[damages.Damage, int] = {
    damages.flip_bits: 24, flip_a_bit_of_the_manifest: 24, damages.truncate: 12, damages.append: 3, damages.delete: 4,
    damages.file_of_another: 6, damages.manifest_of_another: 2, damages.all_of_another: 1, odd_manifest: 30,
    damages.empty: 2, damages.exchange_two_files: 2,
}  # fmt: skip
CASES = [(damage, seed) for damage, number in REPETITIONS.items() for seed in range(number)]


@pytest.mark.parametrize(("damage", "seed"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_damage_is_detected_and_previous_checkpoint_is_used(
    damage: damages.Damage, seed: int, run_dir: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    newest, previous = folder_of(run_dir, 2), folder_of(run_dir, 1)
    assert find_damage(newest) == find_damage(previous) == ""
    intact = {path.name: path.read_bytes() for path in newest.iterdir()}
    damaged = damage(newest, [previous], random.Random(f"{damage.__name__} {seed}"))
    assert {path.name: path.read_bytes() for path in newest.iterdir()} != intact
    assert any(name in find_damage(newest) for name in damaged)
    with caplog.at_level(logging.WARNING):
        assert list(good_checkpoints(run_dir, set_aside=True)) == [previous]
    (warning,) = caplog.messages
    assert str(newest) in warning
    assert "the previous one is used" in warning
    assert not newest.exists()
    assert (newest.parent / "damaged_step_00000002").is_dir()  # nothing is deleted
    assert list(good_checkpoints(run_dir)) == [previous]


def test_no_good_checkpoint_if_all_are_damaged(run_dir: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2):
        (folder_of(run_dir, step) / MODEL).write_bytes(b"")
    assert list(good_checkpoints(run_dir, set_aside=True)) == []
    assert [message.rpartition(", ")[2] for message in caplog.messages] == [
        "the previous one is used",
        "the run starts over",
    ]
    with pytest.raises(CheckpointError, match=r"No good checkpoint last in .*\. Available steps: none\."):
        find_checkpoint(run_dir, "last")


def test_checkpoint_renamed_to_another_step_is_damaged(run_dir: RunDir) -> None:
    moved = folder_of(run_dir, 2).rename(folder_of(run_dir, 9))
    assert find_damage(moved) == f"{MANIFEST} belongs to another checkpoint"


STRANGE = ["step_backup", "step_7", "step_00000002.bak", "step_0000000002", "of yesterday"]


@pytest.mark.parametrize("name", STRANGE)
def test_unknown_folder_is_reported_and_kept(name: str, run_dir: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    """A user's copy of the newest checkpoint, for example: it is not resumed from and does not count when pruning."""
    newest, previous = folder_of(run_dir, 2), folder_of(run_dir, 1)
    strange = shutil.copytree(newest, run_dir.checkpoints / name)
    shutil.copytree(newest, run_dir.checkpoints / "last")  # as a copy that follows links creates it
    assert list(good_checkpoints(run_dir, set_aside=True)) == [newest, previous]
    assert caplog.messages == [f"{strange} is not a checkpoint of this run: ignored"]
    assert read_manifest(strange) == read_manifest(newest)
    assert find_checkpoint(run_dir, "best") == newest


def test_only_checkpoint_folders_reserve_run_name(run_dir: RunDir) -> None:
    run_dir.config.write_text("seed: 1")
    config = parse_config({})
    for folder in run_dir.step_folders():
        folder.rename(folder.with_name(f"{folder.name}.bak"))
    run_dir.check_config(config)
    check_start(run_dir, config, StartOptions("c", resume="never"))
    for name in ("step_00000002", "damaged_step_00000002", ".replaced_step_00000002"):  # as damage or a kill leaves it
        (run_dir.checkpoints / name).mkdir()
        with pytest.raises(ConfigError, match="seed: 1 in the run, 0 now"):
            run_dir.check_config(config)
        with pytest.raises(RunDirError, match="--resume=never forbids"):
            check_start(run_dir, load_config(str(run_dir.config)), StartOptions("c", resume="never"))
        (run_dir.checkpoints / name).rmdir()


def test_checkpoints_sort_by_step_number(run_dir: RunDir) -> None:
    """Sorted as text, step_100000000 would come before step_99999999."""
    late = [write_at(run_dir, step) for step in (99_999_999, 100_000_000, 2_000_000_000)]
    assert list(good_checkpoints(run_dir))[:3] == late[::-1]
    assert find_checkpoint(run_dir, "last") == late[-1]


def test_checkpoint_of_another_run_does_not_count(run_dir: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    """It is not resumed from and does not count when pruning. If either of the two names no run, it is accepted."""
    newest = folder_of(run_dir, 2)  # written before the run had an id, as by an older version
    other = RunDir(run_dir.path.with_name("other"))
    for each, name in ((run_dir, "mine"), (other, "another")):
        each.create()
        begin_attempt(each, parse_config({}), wandb_id=name)
    shutil.copytree(write_at(other, 9, accuracy=0.99), folder_of(run_dir, 9))
    assert [*manifests(run_dir)] == [newest, folder_of(run_dir, 1)]
    mine = write_at(run_dir, 3)
    (mine / MANIFEST).rename(mine / "aside")
    shutil.copytree(mine, folder_of(run_dir, 4))
    (mine / "aside").rename(mine / MANIFEST)
    (folder_of(run_dir, 4) / "aside").rename(folder_of(run_dir, 4) / MANIFEST)  # intact, under another step's name
    assert find_checkpoint(run_dir, "best") == newest
    assert (
        [*manifests(run_dir)]
        == list(good_checkpoints(run_dir, set_aside=True))
        == [mine, newest, folder_of(run_dir, 1)]
    )
    assert "manifest.json belongs to run another, this is run mine" in caplog.messages[0]
    assert "manifest.json belongs to another checkpoint" in caplog.messages[1]
    run_dir.status.path.unlink()
    assert run_id_from_checkpoints(RunDir(run_dir.path)) == "mine"
    assert next(good_checkpoints(RunDir(run_dir.path))) == mine


def test_reading_sets_nothing_aside(run_dir: RunDir) -> None:
    """`evaluate` and messages read checkpoints while another process may be training there."""
    (folder_of(run_dir, 2) / MODEL).write_bytes(b"")
    assert list(good_checkpoints(run_dir)) == [folder_of(run_dir, 1)]
    assert folder_of(run_dir, 2).exists()


def test_checkpoints_by_name(run_dir: RunDir) -> None:
    write_at(run_dir, 3, accuracy=0.15)
    write_at(run_dir, 4)  # not evaluated: no score
    assert find_checkpoint(run_dir, "last") == find_checkpoint(run_dir, "4") == folder_of(run_dir, 4)
    assert find_checkpoint(run_dir, "best") == folder_of(run_dir, 2)
    assert read_manifest(folder_of(run_dir, 4))["score"] is None
    for missing in ("7", "newest", ""):
        with pytest.raises(
            CheckpointError, match=rf"No good checkpoint {missing} in .*\. Available steps: 1, 2, 3, 4\."
        ):
            find_checkpoint(run_dir, missing)
