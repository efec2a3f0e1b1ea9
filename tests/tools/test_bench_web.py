"""What the page of runs may cost, as multiples of the least; seconds of their own depend on the machine."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import pytest

from dist_train.errors import LaunchError
from dist_train.launch.subprocesses import running
from dist_train.runs.directory import RunDir
from dist_train.tools.bench import web
from dist_train.tools.bench.page import server, write_runs
from dist_train.web.run_index import SCAN_S


def test_page_starts_within_some_python_starts() -> None:
    """Today 27 of them, 60 on a machine at work."""
    assert statistics.median(found["start_s"] / found["python_s"] for found in [web.start() for _ in range(3)]) < 200


def test_list_of_1000_runs_costs_a_few_scans() -> None:
    """Today the first list takes 120 to 220 bare scans, a later one 14 to 38, and a second of two tabs 9 to 12."""
    found = web.list_runs(1000, changes=3, idle_s=3.0)
    assert found["cold_s"] < 2000 * found["bare_s"]
    assert found["warm_s"] < 500 * found["bare_s"]
    assert found["idle_percent"] / 100 < 25 * found["bare_s"]
    assert found["rss_mib"] < 80
    assert not found["with_torch"]


def test_watched_training() -> None:
    found = web.watch_training(10, pairs=1, block_s=1.0, watched_s=3.0)
    assert 0 < found["delay_s"] <= found["worst_delay_s"]
    assert found["ratio"] > 0


def test_tab_sees_a_change_in_its_next_poll(tmp_path: Path) -> None:
    write_runs(tmp_path, 3)
    with server(tmp_path) as (_, open_tab):
        tab = open_tab()
        tab.poll()
        before = tab.content
        tab.poll()
        assert tab.content == before  # unchanged: no content
        time.sleep(SCAN_S)
        RunDir(tmp_path / "run-00002").status.update(state="FINISHED", step=938)
        tab.poll()
        assert tab.content != before


def test_a_child_that_ends_at_once_is_reported(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="No config"), running("train", log=tmp_path / "log", has_begun=lambda: False):
        pass
