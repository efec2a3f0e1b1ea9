"""Failure diagnosis from the logs of ranks and torchrun. Complete trainings: tests/faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.atomic_files import write_json
from dist_train.checkpoints.resume_hint import resume_hint
from dist_train.errors import OutOfMemory, PeerLost
from dist_train.launch.diagnosis import diagnose_failure, log_sizes
from dist_train.runs.directory import RunDir
from dist_train.runs.error_report import record_error
from support.tiny_runs import write_at

SUMMARY = """\
Failures:
[1]:
  rank      : 1 (local_rank: 1)
  exitcode  : {code} (pid: 30486)
Root Cause (first observed failure):
[0]:
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 30485)
"""
DUMP = """\
Timeout (0:00:09)!
Thread 0x00007f9ce9bfe6c0 (most recent call first):
  File "/lib/threading.py", line 982 in run

Thread 0x00007f9d23e12b80 (most recent call first):
  File "/code/net.py", line 7 in forward
  File "/code/train.py", line 80 in train
Traceback (most recent call last):
  File "/torch/run.py", line 1 in main
"""


@pytest.fixture
def failed(run_dir: RunDir) -> RunDir:
    """Two ranks; an earlier attempt hung."""
    for path in (run_dir.launcher_log, run_dir.rank_log(0), run_dir.rank_log(1)):
        path.write_text(DUMP)
    return run_dir


def add(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_hung_rank_is_named(failed: RunDir) -> None:
    for rank, log in enumerate([failed.launcher_log, failed.rank_log(1)]):
        before = log_sizes(failed)
        add(log, "\n" + DUMP)
        record_error(failed.error, PeerLost("gone"), 1 - rank, 1, "")
        expected = 'hung in:\n  File "/code/net.py", line 7 in forward\n  File "/code/train.py", line 80 in train'
        cause = diagnose_failure(failed, before)
        assert cause.startswith(f"rank {rank} made no progress")
        assert cause.endswith(expected)
        assert "stall_timeout_s" in cause


def test_waiting_rank_is_not_blamed(failed: RunDir) -> None:
    """All ranks timed out at the same moment."""
    before = log_sizes(failed)
    waiting = DUMP.replace("/code/net.py", "/lib/torch/distributed/distributed_c10d.py")
    add(failed.launcher_log, waiting)
    add(failed.rank_log(1), DUMP)
    assert diagnose_failure(failed, before).startswith("rank 1 made no progress")
    before = log_sizes(failed)
    add(failed.launcher_log, waiting)
    add(failed.rank_log(1), waiting)
    assert diagnose_failure(failed, before).count("made no progress") == 2


def test_reported_error_comes_first(failed: RunDir) -> None:
    """The other ranks' stacks, and torchrun's kill of ranks that do not end, are consequences."""
    before = log_sizes(failed)
    add(failed.launcher_log, DUMP + SUMMARY.format(code=-9))
    record_error(failed.error, OutOfMemory("no more memory"), 0, 1, "")
    assert diagnose_failure(failed, before).startswith("no more memory")


def test_killed_rank_is_named(failed: RunDir) -> None:
    before = log_sizes(failed)
    record_error(failed.error, PeerLost("gone"), 0, 1, "")
    add(failed.launcher_log, SUMMARY.format(code=-9))
    add(failed.rank_log(1), "its last words\n")
    cause = diagnose_failure(failed, before)
    assert cause.startswith("rank 1 was killed by SIGKILL")
    assert cause.endswith("its last words")
    assert "/code/net.py" not in cause, "from an earlier attempt"


def test_first_error_is_shown(failed: RunDir) -> None:
    before = log_sizes(failed)
    record_error(failed.error, ValueError("no such digit"), 1, 1, "")
    add(failed.launcher_log, SUMMARY.format(code=1))
    add(failed.rank_log(1), "its last words\n")
    cause = diagnose_failure(failed, before)
    assert cause.startswith("ValueError: no such digit")
    assert cause.endswith("its last words")


def test_output_of_rank_that_fails_before_reporting_is_shown(failed: RunDir) -> None:
    """Its own output is shown, such as that of a failed import, not torchrun's summary after it."""
    before = log_sizes(failed)
    report = "W1126 02:21:21.49 99 torch/distributed/elastic/multiprocessing/api.py:1028] Sending process 7 a signal\n"
    add(failed.launcher_log, "ImportError: no libcudart\n" + report + SUMMARY.format(code=-15))
    assert diagnose_failure(failed, before).startswith("ImportError: no libcudart\nThe ranks left no error.json.")
    before = log_sizes(failed)
    add(failed.launcher_log, report)
    assert diagnose_failure(failed, before).startswith("W1126")


def test_resume_hint(run_dir: RunDir) -> None:
    assert resume_hint(run_dir, 2) == ""
    write_json(run_dir.status.path, {"step": 2})
    assert resume_hint(run_dir, 2) == "There is no checkpoint yet."
    write_at(run_dir, 3)
    newest = write_at(run_dir, 7)
    assert resume_hint(run_dir, 1).endswith(f"{newest}. To resume: dist-train train --resume {run_dir.path}")
    assert resume_hint(run_dir, 2).endswith(f"--resume {run_dir.path} --nproc 2")
    assert resume_hint(run_dir).endswith(f"the same command with --resume {run_dir.path}")
    (newest / "state.json").write_text("{}")
    assert "step_00000003" in resume_hint(run_dir, 2)
