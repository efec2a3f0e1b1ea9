"""The data folder: one writer at a time, errors in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.data.sets import storage
from dist_train.data.sets.storage import LOCK_NAME, disk_errors, locked
from dist_train.errors import DataError


def test_a_lock_that_is_never_given_back_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And before that, that it is waited for."""
    caplog.set_level("INFO")
    monkeypatch.setattr(storage, "LOCK_TIMEOUT_S", 0.1)
    with (
        locked(tmp_path / "new"),
        pytest.raises(DataError, match=f"held {tmp_path}/new/{LOCK_NAME} for"),
        locked(tmp_path / "new"),
    ):
        pass
    assert caplog.messages == [f"waiting for another process that fills {tmp_path / 'new'}"]
    with locked(tmp_path / "new"):  # given back
        pass


def test_a_root_that_is_a_file_is_one_line_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"Cannot write to .*file: .* Set data\.root or DIST_TRAIN_DATA_DIR"):
        locked(tmp_path / "file").__enter__()


def test_only_errors_of_the_disk_are_reworded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), disk_errors(tmp_path):
        raise ValueError("mine")
