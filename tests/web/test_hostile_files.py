"""Files of a run that its owner did not write as the product does: wrong types, no text, links; never a 500."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import dist_train.web.run_index as module
from dist_train.runs.error_report import record_error
from support.page import client_of, write_run
from support.tiny_runs import write_at

VALUES: list[Any] = ["\ud800", 10**400, [1], {"\ud800": "\ud800"}, float("nan")]
ENTRIES = {
    "status.json": ["state", "step", "total_steps", "epoch", "world_size", "heartbeat", "seconds", "best", "metrics"],
    "result.json": ["test/accuracy", "test/accuracy_by_class", "val/accuracy_by_class", "samples_per_s"],
    "run.json": ["argv", "cwd", "python", "environment", "num_nodes"],
    "layers.json": ["layers"],
    "slurm.json": ["job"],
    "error.json": ["rank", "host", "kind", "message", "traceback"],
    "metrics.jsonl": ["step", "epoch", "samples", "time", "epoch_s", "train/loss", "val/loss", "val/accuracy",
                      "val/f1"],
}  # fmt: skip


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    monkeypatch.setattr(module, "SCAN_S", 0.0)
    run_dir = write_run(tmp_path / "runs", "run")
    write_run(tmp_path / "runs", "whole")
    write_at(run_dir, 10, 0.9)
    record_error(run_dir.error, ValueError("x"), 0, 1, "Traceback")
    return client_of(tmp_path / "runs", tmp_path)[0]


def assert_pages_answer(client: TestClient, what: object) -> None:
    for page in (
        "/",
        "/jobs/run",
        "/jobs/run/points",
        "/jobs/run/evaluations.csv",
        "/jobs/run/settings",
        "/compare?run=run&run=whole",
    ):
        assert client.get(page).status_code < 500, (what, page)


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_of_any_type_never_fail_page(name: str, client: TestClient, tmp_path: Path) -> None:
    path = tmp_path / "runs" / "run" / name
    before = path.read_text().splitlines()[-1:] if name == "metrics.jsonl" else []
    entries = json.loads(before[0] if before else path.read_text() if path.exists() else "{}")
    for entry in ENTRIES[name]:
        for value in VALUES:
            path.write_text(json.dumps(entries | {entry: value}) + "\n")
            os.utime(path.parent)
            assert_pages_answer(client, (entry, value))


def test_pipes_never_hold_up_page(client: TestClient, tmp_path: Path) -> None:
    """Each small file that the server reads: a pipe of that name has no writer."""
    run = tmp_path / "runs/run"
    manifest = next(run.glob("checkpoints/step_*/manifest.json"))
    for path in [*(run / name for name in ENTRIES), run / "config.yaml", run / ".start.lock", manifest,
                 run / "logs/rank_00000.log", run / "pictures/a.png", run / "job.sbatch"]:  # fmt: skip
        path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)
        os.mkfifo(path)
        assert_pages_answer(client, path)
        for page in ("live", "logs", "log?name=rank_00000.log", "files", "outputs.zip", "pictures/a.png"):
            assert client.get(f"/jobs/run/{page}").status_code < 500


@pytest.mark.parametrize("content", [b"\xff", b"a: &a [*a]", b"[" * 500, b"? {a: b}\n: c", b"seed: 3\nseed: 4", b"5"])
def test_any_config_never_fails_page(content: bytes, client: TestClient, tmp_path: Path) -> None:
    (tmp_path / "runs/run/config.yaml").write_bytes(content)
    assert_pages_answer(client, content)


def test_undecodable_names_are_left_out(client: TestClient, tmp_path: Path) -> None:
    runs = os.fsencode(tmp_path / "runs")
    for folder in (b"\xff", b"run/logs", b"run/pictures", b"run/\xff"):
        os.makedirs(runs + b"/" + folder, exist_ok=True)  # noqa: PTH103 - a name that is no text
    for file in (b"\xff/status.json", b"run/logs/\xff.log", b"run/pictures/\xff.png", b"run/\xff/file"):
        Path(os.fsdecode(runs + b"/" + file)).write_text("{}")
    assert_pages_answer(client, "names")
    for page in ("logs", "files", "outputs.zip"):
        assert client.get(f"/jobs/run/{page}").status_code == 200


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "%2Fetc/passwd", "..%2f..%2fwhole/config.yaml", "logs/..%2fconfig.yaml"]
)
def test_no_path_leads_out_of_run(path: str, client: TestClient) -> None:
    assert client.get(f"/jobs/run/files/{path}").status_code == 404


def test_no_linked_log_is_shown(client: TestClient, tmp_path: Path) -> None:
    """Neither as a log of its own, nor as the end of the log of a rank that failed, nor in a folder that is a link."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.log").write_text("SECRET")
    logs = tmp_path / "runs/run/logs"
    (logs / "rank_00000.log").symlink_to(outside / "secret.log")
    assert "SECRET" not in client.get("/jobs/run").text
    shutil.rmtree(logs)
    logs.symlink_to(outside)
    assert client.get("/jobs/run/log?name=secret.log").status_code == 404
    assert "SECRET" not in client.get("/jobs/run").text


def test_file_replaced_by_link_stays_out_of_archive(client: TestClient, tmp_path: Path) -> None:
    from dist_train.runs.directory import RunDir
    from dist_train.web.outputs import stream_zip

    (tmp_path / "secret").write_text("SECRET")
    run = tmp_path / "runs/run"
    (run / "a").write_text("first")
    (run / "z").write_text("last")
    stream = stream_zip(RunDir(run), with_checkpoints=False)
    archive = next(stream)
    (run / "z").unlink()
    (run / "z").symlink_to(tmp_path / "secret")
    archive += b"".join(stream)
    assert b"SECRET" not in archive
    assert b"run/a" in archive


@pytest.mark.parametrize("time", ["9" * 30, "9" * 19, "0"])
def test_odd_names_in_bin(time: str, client: TestClient, tmp_path: Path) -> None:
    (tmp_path / "runs/.bin" / f"{time}-x").mkdir(parents=True)
    assert client.get("/bin").status_code == 200


def test_failing_file_system_never_fails_page(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_path: object) -> None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(shutil, "disk_usage", fail)
    assert_pages_answer(client, "disk usage")
    assert client.get("/machines").status_code == 200
    assert client.get("/jobs/nothing").status_code == 404
