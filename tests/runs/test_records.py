"""Damaged entries in status.json and the other records: reported, and the remaining entries are used."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dist_train.atomic_files import write_json
from dist_train.checkpoints.resume_hint import resume_hint
from dist_train.cli import main
from dist_train.config.loading import parse_config
from dist_train.launch.diagnosis import diagnose_failure
from dist_train.launch.slurm.preemption import decide_requeue
from dist_train.runs.attempt import begin_attempt
from dist_train.runs.directory import RunDir
from dist_train.runs.summary import summarise
from dist_train.training.provenance import changed_data

CONFIG = parse_config({})
USED = ["null", '"text"', "1e999", "-1"]
ENTRIES = [
    *USED, '""', "true", "0.5", "-1e999", "NaN", f"1{'0' * 400}", "[]", '[{"a": null}]', "{}",
    '{"train": "x"}', '{"val/accuracy": 1e999}',
]  # fmt: skip
FILES = ['{"attempt": ', "", "null", "[1]", "7", "\udcff\udcfe", "\0\0", "[" * 99_999, f"1{'0' * 5000}"]


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def write(run_dir: RunDir) -> dict[Path, dict[str, Any]]:
    """Write the records of Slurm job 7, which trained until an error. Return all their entries by file."""
    records: dict[Path, dict[str, Any]] = {
        run_dir.status.path: {
            "state": "TRAINING", "attempt": 4, "step": 30, "total_steps": 90, "epoch": 1.5, "reached": 40,
            "resumed_at": 20, "fruitless_starts": 0, "world_size": 2, "heartbeat": 1e9, "host": "h", "pid": 7,
            "slurm_job_id": "7", "slurm_restart_count": "1", "wandb_id": "mine", "seconds": {"train": 3.0},
            "data_wait_s": 0.5, "save_s": 0.1, "best": {"val/accuracy": 0.5, "step": 20},
            "metrics": {"perf/samples_per_s": 9.0, "train/grad_norm": None},
        },
        run_dir.run_json: {
            "attempt": 4, "wandb_id": "mine", "world_size": 2, "num_nodes": 1, "num_threads": 1, "device": "cpu",
            "cpu": "c", "mixed_precision": "no", "step_mode": "eager", "versions": {"torch": "2"},
            "data": {"in_channels": 1, "num_classes": 2, "image_size": 8, "classes": None, "pixels": True},
        },
        run_dir.error: {"rank": 1, "host": "h", "kind": "ValueError", "message": "ValueError: no", "exit_code": 1},
        run_dir.result: {"test/accuracy": 0.5, "train_s": 1.0, "samples_per_s": None, "step": 90},
        run_dir.slurm_json: {"job": "7", "log": "out", "submitted": 1e9},
    }  # fmt: skip
    for path, entries in records.items():
        write_json(path, entries, durable=False)
    return records


def use(path: Path) -> RunDir:
    """Call everything that reads these files: the list of runs, one run, the diagnosis, a requeue, the next start."""
    run_dir, run = RunDir(path), summarise(path)
    assert run.age_s is None or run.age_s >= 0
    for each in (run.progress, run.accuracy, run.test_accuracy, run.samples_per_s, *run.seconds.values()):
        assert each is None or each == float(each)
    for command in ("ls", "show"):
        result = CliRunner().invoke(
            main, ["runs", command, *(["--in", str(path.parent)] if command == "ls" else [str(path)])]
        )
        assert (result.exit_code, result.exception) == (0, None), result.output
    assert diagnose_failure(run_dir, {})
    assert resume_hint(run_dir) in ("", "There is no checkpoint yet.")
    assert decide_requeue(run_dir, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, 9)[1]
    begin_attempt(run_dir, CONFIG, wandb_id="new")
    return run_dir


@pytest.mark.parametrize("name", ["status.json", "run.json", "error.json", "result.json", "slurm.json"])
def test_only_entry_of_wrong_type_is_ignored(name: str, run_dir: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    path = run_dir.path / name
    read = {
        run_dir.status.path: run_dir.status.read, run_dir.run_json: run_dir.read_provenance,
        run_dir.error: run_dir.read_error, run_dir.result: run_dir.read_result,
        run_dir.slurm_json: run_dir.read_submission,
    }[path]  # fmt: skip
    entries = write(run_dir)[path]
    assert read() == entries
    for entry in entries:
        for text in ENTRIES:
            write(run_dir)
            others = {other: value for other, value in entries.items() if other != entry}
            path.write_text(f'{json.dumps(others)[:-1]}, "{entry}": {text}}}')
            actual = read()
            assert {other: value for other, value in actual.items() if other != entry} == others, (entry, text)
            if text in USED:
                assert use(run_dir.path).status.attempt == 5
                assert entry == "wandb_id" or run_dir.status.read()["wandb_id"] == "mine"


@pytest.mark.parametrize("text", FILES, ids=lambda text: repr(text[:9]))
def test_unreadable_record_is_reported_once(text: str, run_dir: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    for path in write(run_dir):
        write(run_dir)
        path.write_bytes(text.encode(errors="surrogateescape"))
        with caplog.at_level(logging.WARNING):
            assert use(run_dir.path).status.attempt == 5
        (message,) = caplog.messages
        assert message.startswith(f"{path} is damaged: ")
        caplog.clear()


def test_damaged_entry_is_reported_with_its_value(run_dir: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    run_dir.status.path.write_text('{"state": "TRAINING", "attempt": null, "step": "x", "of a later version": null}')
    for _ in range(2):
        assert run_dir.status.read() == {"state": "TRAINING", "of a later version": None}
    assert caplog.messages == [
        f"{run_dir.status.path} is damaged: attempt=None, step='x'. Continuing without that part."
    ]


def key_paths(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the key path of every nested item."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from key_paths(item, (*path, key))


def test_data_identity_is_read_whole_or_not_at_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With any value at any position in it, or with any item missing."""
    now = {"train": {"count": 9, "labels": "x", "examples": {"0": {"exact": "y", "floats": [[0.5, 1.0], [0.0, 2.0]]}}}}
    damages = [(keys, text) for keys in key_paths(now) for text in (*ENTRIES, None)]
    for number, (keys, text) in enumerate(damages):
        then = json.loads(json.dumps(now))
        parent = reduce(getitem, keys[:-1], then)
        parent[keys[-1]] = "here"
        if text is None:
            del parent[keys[-1]]
        run_dir = RunDir(tmp_path / str(number))
        run_dir.path.mkdir()
        run_dir.run_json.write_text(json.dumps({"data_identity": then}).replace('"here"', text or ""))
        caplog.clear()
        provenance = run_dir.read_provenance()
        changes = changed_data(provenance, now)
        assert ("data_identity" in provenance) != (f"{run_dir.run_json} is damaged: data_identity=" in caplog.text)
        assert "data_identity" in provenance or changes == []
        if text is None and keys[-1] in ("count", "exact", "floats"):
            assert "data_identity" not in provenance


def test_missing_file_is_not_reported_as_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_dir = RunDir(tmp_path / "none")
    assert run_dir.status.read() == run_dir.read_provenance() == run_dir.read_error() == {}
    assert caplog.messages == []
