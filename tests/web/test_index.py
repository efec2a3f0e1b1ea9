"""The index of runs: after any changes it lists what a new index lists, and reads only what has changed."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

import dist_train.web.run_index as module
from dist_train.atomic_files import write_json
from dist_train.runs.summary import Summary, summarise
from dist_train.web.run_index import Listing, RunIndex
from support.page import OF_TABLE, client_of, write_run

TABLE, COLUMNS = OF_TABLE


@pytest.fixture(autouse=True)
def _scan_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SCAN_S", 0.0)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # takes most of the time of a history


def shown(listing: Listing) -> dict[str, tuple[object, ...]]:
    return {
        name: (entry.summary.state, entry.summary.step, entry.summary.result, entry.signature, entry.row_id)
        for name, entry in listing.entries.items()
    }


STATES = ["FINISHED", "INTERRUPT", "ERROR", "TRAINING", "SETUP"]


def change(folder: Path, rng: Random) -> None:
    """Make one random change to one of a few runs."""

    def status(path: Path) -> None:
        write_json(path / "status.json", {"state": rng.choice(STATES), "step": rng.randrange(20)})

    of_any_run: list[Callable[[Path], object]] = [
        lambda path: write_run(folder, path.name, rng.choice(STATES)),
        lambda path: shutil.rmtree(path, ignore_errors=True),
        lambda path: (folder / f"file {rng.randrange(3)}").write_text("not a run"),
    ]
    of_existing_run: list[Callable[[Path], object]] = [
        status,
        lambda path: (path / "status.json").write_text("{"),
        lambda path: path.rename(folder / f"run {rng.randrange(6, 9)} {time.time_ns()}"),
        lambda path: (path / "result.json").unlink(missing_ok=True),
    ]
    path = folder / f"run {rng.randrange(6)}"
    rng.choice(of_any_run + of_existing_run * path.is_dir())(path)


def test_index_after_changes_equals_new_index(
    tmp_path: Path, count: Callable[..., int], row: Callable[..., None]
) -> None:
    histories = count(400, 8)
    for seed in range(histories):
        folder, rng = tmp_path / str(seed), Random(seed)
        folder.mkdir()
        index = RunIndex(folder)
        before = index.listing()
        for _ in range(25):
            change(folder, rng)
            now = index.listing()
            assert shown(now) == shown(RunIndex(folder).listing()), seed
            assert (now.version == before.version) == (shown(now) == shown(before)), seed
            before = now
        shutil.rmtree(folder)
    row("25 random changes to the folder of runs", histories, "the list equals that of a new server after each")


def test_thousands_of_runs(tmp_path: Path, count: Callable[..., int], row: Callable[..., None]) -> None:
    """Each is on exactly one page, in the order asked for, and a change is seen."""
    folder, number = tmp_path / "runs", count(10_000, 250)
    for each in range(number):
        (folder / f"run{each:05}").mkdir(parents=True)
        (folder / f"run{each:05}/status.json").write_text(f'{{"state": "FINISHED", "step": {each}}}')
    client, _ = client_of(folder, tmp_path)

    def rows_of(query: str) -> list[str]:
        parts = client.get(f"/rows?{query}").text.split('name="run" value="')[1:]
        return [part.partition('"')[0] for part in parts]

    pages = [rows_of(f"sort=name&page={page}") for page in range(1, math.ceil(number / 100) + 1)]
    assert [name for page in pages for name in page] == [f"run{each:05}" for each in range(number)]
    assert rows_of("q=run00123") == ["run00123"]
    since = client.get("/").text.split("rows?since=")[1].split("&")[0]
    assert client.get(f"/rows?since={since}").status_code == 204
    write_json(folder / "run00123/status.json", {"state": "TRAINING", "heartbeat": time.time()})
    assert rows_of(f"since={since}&sort=name")[:2] == ["run00123", "run00000"]
    row("runs in one folder", f"{number:,}", "each on one page in the order asked for; a change is seen")


def test_unchanged_runs_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        write_run(tmp_path, f"run {number}")
    index = RunIndex(tmp_path)
    index.listing()
    read: list[str] = []

    def record(path: Path) -> Summary:
        read.append(path.name)
        return summarise(path)

    monkeypatch.setattr(module, "summarise", record)
    index.listing()
    assert read == []
    write_json(tmp_path / "run 3" / "status.json", {"state": "INTERRUPT", "step": 5})
    assert index.listing().entries["run 3"].summary.step == 5
    assert read == ["run 3"]


def test_state_changes_with_time_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, "run", "TRAINING", 10)
    index = RunIndex(tmp_path)
    first = index.listing()
    assert first.entries["run"].summary.state == "TRAINING"
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 300)
    later = index.listing()
    assert later.entries["run"].summary.state == "SILENT"
    assert later.version != first.version


def test_versions_differ_between_servers(tmp_path: Path) -> None:
    """A browser that asks a restarted server with the old version gets the rows."""
    assert RunIndex(tmp_path).listing().version != RunIndex(tmp_path).listing().version


def test_unreadable_folder_keeps_last_rows(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    write_run(folder, "run")
    index = RunIndex(folder)
    index.listing()
    folder.rename(tmp_path / "moved")
    folder.write_text("a file")
    found = index.listing()
    assert "run" in found.entries
    assert found.error is not None
    assert "cannot be read" in found.error
    folder.unlink()
    (tmp_path / "moved").rename(folder)
    assert index.listing().error is None


def test_no_folder_yet(tmp_path: Path) -> None:
    index = RunIndex(tmp_path / "runs")
    assert index.listing().entries == {}
    write_run(tmp_path / "runs", "first")
    assert list(index.listing().entries) == ["first"]


def test_links_and_odd_names(tmp_path: Path) -> None:
    write_run(tmp_path / "elsewhere", "real")
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "elsewhere" / "real")
    (folder / "nowhere").symlink_to(tmp_path / "gone")
    write_run(folder, "lr=0.1,x")
    os.mkdir(os.fsencode(folder) + b"/bad\xff")  # noqa: PTH102 - a name that is no text
    (folder / ".hidden").mkdir()
    found = RunIndex(folder).listing().entries
    assert set(found) == {"link", "lr=0.1,x"}
    assert all(entry.row_id.replace("-", "").isalnum() for entry in found.values())
