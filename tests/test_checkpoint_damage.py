"""A damaged checkpoint is found whatever the damage, named, set aside, and the one before it is used."""

from __future__ import annotations

import json
import logging
import random
import shutil
from pathlib import Path

import pytest

from dist_train.errors import CheckpointError
from dist_train.manifest import (
    MANIFEST,
    MODEL,
    find_checkpoint,
    find_damage,
    folder_of,
    good,
    read_manifest,
)
from dist_train.run_dir import RunDir
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
    """Parts of the manifest missing or of another type, and manifests that are none."""
    manifest = json.loads((newest / MANIFEST).read_text())
    strange: list[object] = [None, 7, "2", [], {}, {"files": 1}, {"bytes": 1}]
    key = chance.choice([*manifest, "whole"])
    if key == "whole":
        manifest = chance.choice(strange)
    elif chance.random() < 0.3:
        del manifest[key]
    elif key == "files" and chance.random() < 0.7:
        manifest["files"][chance.choice([MODEL, "another"])] = chance.choice(strange)
    else:
        manifest[key] = chance.choice(strange)
    (newest / MANIFEST).write_text(json.dumps(manifest))
    return {MANIFEST}


HOW_OFTEN: dict[damages.Damage, int] = {
    damages.flip_bits: 24, flip_a_bit_of_the_manifest: 24, damages.truncate: 12, damages.append: 3, damages.delete: 4,
    damages.file_of_another: 6, damages.manifest_of_another: 2, damages.all_of_another: 1, odd_manifest: 30,
    damages.empty: 2, damages.exchange_two_files: 2,
}  # fmt: skip
CASES = [(damage, seed) for damage, how_often in HOW_OFTEN.items() for seed in range(how_often)]


@pytest.mark.parametrize(("damage", "seed"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_damage_is_found_and_the_checkpoint_before_is_used(
    damage: damages.Damage, seed: int, run_dir: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    newest, before = folder_of(run_dir, 2), folder_of(run_dir, 1)
    assert find_damage(newest) == find_damage(before) == ""
    intact = {path.name: path.read_bytes() for path in newest.iterdir()}
    touched = damage(newest, [before], random.Random(f"{damage.__name__} {seed}"))
    assert {path.name: path.read_bytes() for path in newest.iterdir()} != intact
    assert any(name in find_damage(newest) for name in touched)
    with caplog.at_level(logging.WARNING):
        assert list(good(run_dir, set_aside=True)) == [before]
    (warning,) = caplog.messages
    assert str(newest) in warning
    assert "the one before is used" in warning
    assert not newest.exists()
    assert (newest.parent / "damaged_step_00000002").is_dir()  # nothing is thrown away
    assert list(good(run_dir)) == [before]


def test_all_damaged_is_none_good(run_dir: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2):
        (folder_of(run_dir, step) / MODEL).write_bytes(b"")
    assert list(good(run_dir, set_aside=True)) == []
    assert [message.rpartition(", ")[2] for message in caplog.messages] == [
        "the one before is used",
        "the run begins anew",
    ]
    with pytest.raises(CheckpointError, match=r"No good checkpoint last in .*\. Steps there: none\."):
        find_checkpoint(run_dir, "last")


def test_a_folder_under_another_name_is_damaged(run_dir: RunDir) -> None:
    moved = folder_of(run_dir, 2).rename(folder_of(run_dir, 9))
    assert find_damage(moved) == f"{MANIFEST} belongs to another checkpoint"


def test_looking_moves_nothing(run_dir: RunDir) -> None:
    """`evaluate` and messages look while another process may be training there."""
    (folder_of(run_dir, 2) / MODEL).write_bytes(b"")
    assert list(good(run_dir)) == [folder_of(run_dir, 1)]
    assert folder_of(run_dir, 2).exists()


def test_checkpoints_by_name(run_dir: RunDir) -> None:
    write_at(run_dir, 3, accuracy=0.15)
    write_at(run_dir, 4)  # not evaluated: no score
    assert find_checkpoint(run_dir, "last") == find_checkpoint(run_dir, "4") == folder_of(run_dir, 4)
    assert find_checkpoint(run_dir, "best") == folder_of(run_dir, 2)
    assert read_manifest(folder_of(run_dir, 4))["score"] is None
    for missing in ("7", "newest", ""):
        with pytest.raises(CheckpointError, match=rf"No good checkpoint {missing} in .*\. Steps there: 1, 2, 3, 4\."):
            find_checkpoint(run_dir, missing)
