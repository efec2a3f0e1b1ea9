"""Files of the run directory: leftovers, the first error, and full or read-only disks."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_train.atomic_files import read_json, temporary_path
from dist_train.config.loading import parse_config
from dist_train.errors import ConfigError, RunDirError
from dist_train.runs.attempt import begin_attempt
from dist_train.runs.directory import RunDir
from dist_train.runs.error_report import record_error
from support.mounts import needs_mounts
from support.run_files import contents


def test_next_start_removes_leftovers_of_killed_starts(run_dir: RunDir) -> None:
    before = {path.name for path in run_dir.path.iterdir()}
    for name in (".probe_host_7", ".token_ab12", temporary_path(run_dir.status.path).name, ".mine"):
        (run_dir.path / name).touch()
    begin_attempt(run_dir, parse_config({}), "id")
    assert {path.name for path in run_dir.path.iterdir()} == before | {".mine"}


def test_first_error_is_kept_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")  # as FAT and some network file systems do

    monkeypatch.setattr(os, "link", refuse)
    test_first_error_is_kept(tmp_path)


def test_unreadable_json_reads_as_empty_object(tmp_path: Path) -> None:
    for text in ("", "[1]", '{"a": ', "\0"):
        (tmp_path / "file").write_text(text)
        assert read_json(tmp_path / "file") == {}
    assert read_json(tmp_path / "missing") == {}


def test_first_error_is_kept(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert record_error(run.error, ConfigError("mine"), rank=1, exit_code=2, trace="t")
    assert not record_error(run.error, ValueError("theirs"), rank=0, exit_code=1, trace="t")
    error = read_json(run.error)
    assert (error["rank"], error["kind"], error["message"], error["exit_code"]) == (1, "ConfigError", "mine", 2)
    assert [name for name in contents(run.path) if "error" in name] == ["error.json"]


# --- disks -------------------------------------------------------------------------------------------------------

ON_DISKS = """
import sys
from pathlib import Path
from dist_train.atomic_files import write_atomically
from dist_train.checkpoints.disk_space import CheckpointSize, check_room
from dist_train.errors import RunDirError
from dist_train.runs.directory import RunDir
for path in sys.argv[1:]:
    run = RunDir(Path(path) / "run")
    try:
        run.create()
        check_room(run, CheckpointSize(20_000, 40_000))
        check_room(run, CheckpointSize(1 << 20, 1 << 20))
    except RunDirError as error:
        print(error)
try:
    write_atomically(run.config, "x" * (4 << 20))
except OSError as error:
    print(error.strerror, sorted(p.name for p in run.path.iterdir()))
"""


@needs_mounts
def test_read_only_and_full_disks_give_one_line(tmp_path: Path) -> None:
    for name in ("read_only", "small"):
        (tmp_path / name).mkdir()
    script = """
        mount --bind "$1" "$1"; mount -o remount,ro,bind "$1"; mount -t tmpfs -o size=2m tmpfs "$2"
        exec "$0" -c "$3" "$1" "$2"
    """
    paths = [str(tmp_path / "read_only"), str(tmp_path / "small")]
    argv = ["unshare", "-m", "sh", "-euc", script, sys.executable, *paths, ON_DISKS]
    out = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[0].startswith(f"Run directory {paths[0]}/run cannot be written: Read-only file system. Choose another ")
    assert out[1].startswith("Checkpoints need 2 x 2.0 MiB (1.0 weights + 1.0 optimizer state) = 4.0 MiB, ")
    assert f"{paths[1]}/run has 2.0 MiB free. Make room, or " in out[1]
    assert out[2:] == ["No space left on device ['logs']"]


def test_run_directory_inside_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunDirError, match=r"file/run cannot be written: .* runs_dir or DIST_TRAIN_RUNS_DIR"):
        RunDir(tmp_path / "file" / "run").create()


def test_illegal_directory_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match=r"x cannot be written: File name too long\. Choose another location"):
        RunDir(tmp_path / ("x" * 300)).check_config(parse_config({}))
