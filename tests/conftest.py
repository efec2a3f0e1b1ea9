"""Isolation of the tests: own data folder and caches, no network, no W&B account, one thread, clean environment."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from support.once import shared_folder
from support.schedule import in_order
from support.tables import tables_of

if TYPE_CHECKING:
    from dist_train.distributed.world import World
    from dist_train.runs.directory import RunDir

# The same examples each time, no database of past failures in the tree.
settings.register_profile("dist_train", deadline=None, database=None, derandomize=True)
settings.load_profile("dist_train")

# OpenMP reads it when torch is loaded. One thread per process of the suite; `make cpus` sets two.
os.environ["OMP_NUM_THREADS"] = os.environ.get("TEST_THREADS", "1")

# A shell's background jobs ignore INT, and `nohup` ignores HUP; every process that a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PREFIXES = ("SLURM_", "ACCELERATE_", "WANDB_", "DIST_TRAIN_", "TORCHELASTIC_", "PET_")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="Run all faults and jobs, not only the default subset.")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr != "gpu":  # the others mean the CPU, and more ranks than there are GPUs
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    deselected = [] if config.getoption("--full") else [item for item in items if item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=deselected)
    items[:] = in_order(item for item in items if item not in deselected)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Use the argument's name for bytes: they may differ between workers (gzip stores the time), test ids must not."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="session", autouse=True)
def _clean_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = dict(os.environ)
    for name in list(os.environ):
        if name in _LAUNCHERS or name.startswith(_PREFIXES):
            del os.environ[name]
    cache, shared = tmp_path_factory.mktemp("cache"), shared_folder(tmp_path_factory)
    os.environ |= {
        "DIST_TRAIN_DATA_DIR": str(shared / "data"),
        "MPLCONFIGDIR": str(shared / "matplotlib"),
        "TORCHINDUCTOR_CACHE_DIR": str(shared / "inductor"),  # empty at the start of each session
        "XDG_CACHE_HOME": str(cache),
        "HF_HOME": str(cache / "hf"),
        "WANDB_MODE": "disabled",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent), before.get("PYTHONPATH")])),
    }
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _restored_environment() -> Iterator[None]:
    """Fail a test that does not restore environment variables and the current folder."""
    environment, folder = dict(os.environ), Path.cwd()
    yield
    changed = {name for name in os.environ.keys() | environment.keys() if os.environ.get(name) != environment.get(name)}
    changed -= {"PYTEST_CURRENT_TEST"}
    assert not changed, f"environment variables not restored: {sorted(changed)}"
    assert Path.cwd() == folder


@pytest.fixture
def count(request: pytest.FixtureRequest) -> Callable[..., int]:
    """Return count(full, part): the number of numbered cases to run: all `full` with --full, else the first `part`.

    The default of `part` is a tenth of `full`.
    """
    run_all = request.config.getoption("--full")
    return lambda full, part=0: full if run_all else part or max(1, full // 10)


@pytest.fixture
def process_state(_restored_environment: None) -> Iterator[None]:
    """Restores what joining a world changes in this process."""
    from dist_train.distributed.process_state import preserve_process_state

    with preserve_process_state():
        yield


@pytest.fixture
def world(process_state: None) -> World:
    """A world of one process, this one."""
    from dist_train.config.loading import parse_config
    from dist_train.distributed.world import World

    return World.join(parse_config({"device": "cpu"}))


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """The directory of a run during its first attempt."""
    from dist_train.config.loading import parse_config
    from dist_train.runs.attempt import begin_attempt
    from dist_train.runs.directory import RunDir

    made = RunDir(tmp_path / "run")
    made.create()
    begin_attempt(made, parse_config({}), "id")
    return made


# --- the tables of docs/cluster.md and docs/faults.md, printed at the end of a session --------------------------------

_TABLE = "cluster runs"
_COLUMNS = ("fault", "outcome", "seconds", "steps lost", "verified")


@pytest.fixture
def row(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Return row(*cells), which adds one row to the table that the test's module defines (TABLE, COLUMNS).

    A last column with the name of the test is added automatically.
    """
    title = getattr(request.module, "TABLE", _TABLE)
    columns = getattr(request.module, "COLUMNS", _COLUMNS)

    def add(*cells: object) -> None:
        assert len(cells) == len(columns)
        record_property("row", [title, [*columns, "test"], [*map(str, cells), f"`{request.function.__name__}`"]])

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for title, (header, *rows) in tables_of(terminalreporter.stats.get("passed", [])):
        terminalreporter.section(title)
        for cells in (header, ["---"] * len(header), *rows):
            terminalreporter.write_line(f"| {' | '.join(cells)} |")
