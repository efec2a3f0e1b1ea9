"""SIGKILL of any process at any moment: after a restart the run ends as if it had not been killed."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from dist_train.atomic_files import read_json
from support.kill_plan import ANYWHERE, PHASES, RANK_ZERO, SAVE, Chain, Kill, plan, sample
from support.once import made_once
from support.patience import wait_until
from support.processes import DIST_TRAIN, alive, run, started
from support.ranks import run_forked
from support.run_files import assert_bit_identical

TABLE = "kills"
COLUMNS = ("phase", "point, occurrence", "killed", "processes", "last process gone after")

KILLER = Path(__file__).parent / "killer"
# Averages, micro-steps, dropout, a streamed set with random transforms: everything that a checkpoint has to restore.
SETTINGS = """
data: {name: "support.user_sets:Jittered"}
model: {name: "support.user_sets:WithDropout"}
global_batch_size: 12
per_device_batch_size: 4
train_for: 240 steps
eval_every: 20 steps
log_every: 5
save_every: 10 steps
optimizer: {lr: 1e-2}
schedule: {name: cosine, warmup: 10 steps}
max_grad_norm: 1.0
ema_decay: 0.9
"""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "chain" in metafunc.fixturenames:
        chains = plan() if metafunc.config.getoption("--full") else sample()
        metafunc.parametrize("chain", list(chains), ids=str)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Return a function that gives the run that is never killed, for a number of processes."""

    def run_on(nproc: int) -> Path:
        def make(folder: Path) -> None:
            start = command(folder, nproc, "r")
            done = run_forked([*DIST_TRAIN, "train", *start[start.index("-q") :]], folder, nproc)
            assert done.returncode == 0, done.stderr

        return made_once(tmp_path_factory, f"never killed on {nproc}", make) / "runs/r"

    return run_on


def command(folder: Path, nproc: int, name: str) -> list[str]:
    settings = folder / f"settings_{name}.yaml"
    settings.write_text(SETTINGS)
    return [*DIST_TRAIN, "launch", "--nproc", str(nproc), "-q", "-c", settings.name, "--run-name", name]


def test_plan_covers_all_phases_and_targets() -> None:
    chains = list(plan())
    kills = [kill for chain in chains for kill in chain.kills]
    assert len(kills) >= 100
    assert 3 * sum(len(chain.kills) for chain in chains if chain.nproc == 3) >= len(kills)
    assert min(Counter(kill.phase for kill in kills)[phase] for phase in PHASES) >= 5
    assert min(Counter(kill.target for kill in kills).values()) >= 10
    for phase in (*ANYWHERE, *RANK_ZERO):
        assert {kill.target for kill in kills if kill.phase == phase} >= {"rank 0", "another rank", "all"}
    sampled = [kill for chain in sample() for kill in chain.kills]
    assert len(sampled) >= len(kills) // 10
    assert {kill.phase for kill in sampled} >= {*SAVE, "before FINISHED", "replace", "after FINISHED"}


@pytest.mark.timeout(1800)
def test_killed_run_equals_undisturbed_run(
    chain: Chain, undisturbed: Callable[[int], Path], tmp_path: Path, row: Callable[..., None]
) -> None:
    run_dir = tmp_path / "runs/r"
    start = command(tmp_path, chain.nproc, "r")
    # Offline W&B has a helper process, which must end too.
    mode = "offline" if chain.number % 6 == 2 else "disabled"
    begun = 0
    for number, kill in enumerate(chain.kills):
        seconds = kill_one(start, kill, tmp_path, tmp_path / f"pids_{number}", mode)
        attempt = read_json(run_dir / "status.json").get("attempt", 0)
        if kill.begun is None:
            assert attempt in (begun, begun + 1)
        else:
            assert attempt == begun + kill.begun, kill
        begun = attempt
        row(kill.phase, f"{kill.point}, {kill.nth}", kill.target, chain.nproc, f"{seconds:.1f} s")
    finished = chain.kills[-1].phase == "after FINISHED"
    done = run(start, tmp_path, WANDB_MODE=mode)
    assert done.returncode == 0, done.stderr
    assert ("finished already" in done.stdout) == finished
    status = read_json(run_dir / "status.json")
    assert (status["state"], status["attempt"]) == ("FINISHED", begun + (not finished))
    assert_same_run(run_dir, undisturbed(chain.nproc))


def kill_one(start: list[str], kill: Kill, folder: Path, pids: Path, mode: str) -> float:
    """Start the run and kill it. Return the seconds until no process was left."""
    pids.mkdir()
    names = ("point", "nth", "role", "victims", "hold")
    fault = json.dumps({name: getattr(kill, name) for name in names} | {"folder": str(pids)})
    path = os.pathsep.join([str(KILLER), os.environ["PYTHONPATH"]])
    with started(start, folder, FAULT=fault, PYTHONPATH=path, WANDB_MODE=mode) as process:
        wait_until(lambda: (pids / "hit").exists() or process.poll() is not None, f"{kill}")
        hit = monotonic()
        assert (pids / "hit").exists(), f"ended before {kill}: {process.communicate()}"
        assert (pids / "hit").read_text() == kill.point
        wait_until(lambda: alive(folder) == [], f"end of all after {kill}")
    return monotonic() - hit


def assert_same_run(one: Path, other: Path) -> None:
    """Check that weights, optimizer state, metrics and results are bit-identical, and that no files are left over."""
    assert_bit_identical(one, other)
    assert results(one) == results(other)
    assert files(one) == files(other)
    for weights in (one / "checkpoints").glob("step_*/model.safetensors"):
        assert weights.read_bytes() == (other / weights.relative_to(one)).read_bytes()


def results(run_dir: Path) -> dict[str, Any]:
    times = ("attempt", "samples_per_s", "seconds", "effective_training_time")
    result = read_json(run_dir / "result.json")
    return {name: value for name, value in result.items() if name not in times and not name.endswith("_s")}


def files(run_dir: Path) -> set[str]:
    """Return the names of a run's files, except those that may differ.

    These are discarded metrics, one W&B run for each attempt, and pictures, which are drawn after FINISHED, so that a
    kill then leaves them out. The undisturbed run has no launcher.
    """
    names = {path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*")}
    ignored = ("metrics.discarded.jsonl", "wandb", "pictures", "logs/launcher.log")
    return {name for name in names if not name.startswith(ignored)}
