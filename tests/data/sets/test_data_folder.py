"""The data folder: one writer at a time and one-line errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.data.sets import data_folder
from dist_train.data.sets.data_folder import LOCK_NAME, disk_errors, locked
from dist_train.errors import DataError


def test_lock_that_is_never_released_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The wait is logged before."""
    caplog.set_level("INFO")
    monkeypatch.setattr(data_folder, "LOCK_TIMEOUT_S", 0.1)
    with (
        locked(tmp_path / "new"),
        pytest.raises(DataError, match=f"held {tmp_path}/new/{LOCK_NAME} for"),
        locked(tmp_path / "new"),
    ):
        pass
    assert caplog.messages == [f"Waiting for another process that is writing to {tmp_path / 'new'}."]
    with locked(tmp_path / "new"):  # released
        pass


def test_root_that_is_a_file_error_names_fix(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"Cannot write to .*file: .* Set data\.root or DIST_TRAIN_DATA_DIR"):
        locked(tmp_path / "file").__enter__()


def test_only_disk_errors_are_translated(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), disk_errors(tmp_path):
        raise ValueError("mine")
