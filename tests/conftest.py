"""Tests leave no trace: own data folder and caches, no network, no W&B account, one thread, a clean environment."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from dist_train.distributed import World
    from dist_train.run_dir import RunDir

# The same examples each time, no database of past failures in the tree.
settings.register_profile("dist_train", deadline=None, database=None, derandomize=True)
settings.load_profile("dist_train")

# A shell's background job ignores INT and `nohup` HUP, and so would every process that a test starts and signals.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PREFIXES = ("SLURM_", "ACCELERATE_", "WANDB_", "DIST_TRAIN_", "TORCHELASTIC_", "PET_")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-faults", action="store_true", help="All faults of tests/faults, not a tenth of them.")


@pytest.fixture(scope="session", autouse=True)
def _clean_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = dict(os.environ)
    for name in list(os.environ):
        if name in _LAUNCHERS or name.startswith(_PREFIXES):
            del os.environ[name]
    cache = tmp_path_factory.mktemp("cache")
    os.environ |= {
        "DIST_TRAIN_DATA_DIR": str(cache / "data"),
        "XDG_CACHE_HOME": str(cache),
        "HF_HOME": str(cache / "hf"),
        "WANDB_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        # One process of this suite per core is enough: OpenMP threads that spin would slow the others down.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent), before.get("PYTHONPATH")])),
    }
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _no_traces() -> Iterator[None]:
    """A test that leaves environment variables or the current folder changed fails."""
    environment, folder = dict(os.environ), Path.cwd()
    yield
    left = {name for name in os.environ.keys() | environment.keys() if os.environ.get(name) != environment.get(name)}
    left -= {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR"}  # the latter is set by importing torchvision.models
    assert not left, f"environment variables left changed: {sorted(left)}"
    assert Path.cwd() == folder


@pytest.fixture
def world(_no_traces: None) -> Iterator[World]:
    """A world of this process alone."""
    from accelerate.state import AcceleratorState, GradientState

    from dist_train.config_file import parse_config
    from dist_train.distributed import World

    before = dict(os.environ)
    yield World.join(parse_config({"device": "cpu"}))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """The directory of a run in its first attempt."""
    from dist_train.config_file import parse_config
    from dist_train.run_dir import RunDir

    made = RunDir(tmp_path / "run")
    made.create()
    made.begin_attempt(parse_config({}), "id")
    return made


# --- the tables of docs/cluster.md and docs/faults.md, printed at the end of a session --------------------------------

_TABLE = "what became of the runs"
_COLUMNS = ("what happens", "what becomes of it", "seconds", "steps lost", "verified")


@pytest.fixture
def row(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Called with a cell for each column of the table that the test's module names (TABLE, COLUMNS)."""
    title = getattr(request.module, "TABLE", _TABLE)
    columns = getattr(request.module, "COLUMNS", _COLUMNS)

    def add(*cells: object) -> None:
        assert len(cells) == len(columns)
        record_property("row", [title, list(columns), [str(cell) for cell in cells]])

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = terminalreporter.stats.get("passed", [])
    reports = sorted(reports, key=lambda report: report.location[:2])  # as in the files, whoever ran them
    tables: dict[str, list[list[str]]] = {}
    for title, columns, cells in (
        value for report in reports for name, value in report.user_properties if name == "row"
    ):
        tables.setdefault(title, [columns, ["---"] * len(columns)]).append(cells)
    for title, rows in tables.items():
        terminalreporter.section(title)
        for cells in rows:
            terminalreporter.write_line(f"| {' | '.join(cells)} |")
