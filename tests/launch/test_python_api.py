"""`from dist_train import train`: runs of a script or notebook, in its own process, whose state is restored."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from dist_train import Config, load_config, train
from dist_train.atomic_files import read_json
from dist_train.distributed.rng import generator_states
from dist_train.errors import ConfigError, DataError, LaunchError, TrainingDiverged, UserCodeError
from support.patience import PATIENCE_S, wait_until
from support.run_files import train_losses
from support.user_nets import OPEN

SETTINGS = [
    "data.name=support.user_sets:mnist_part", "model.name=mlp", "global_batch_size=96", "train_for=4 steps",
    "log_every=1", "final_train_eval=false", "tracking.wandb=disabled", "tracking.pictures=false", "device=cpu",
]  # fmt: skip


def settings(*overrides: str) -> Config:
    return load_config("mnist", [*SETTINGS, *overrides])


def state_of_the_process() -> dict[str, Any]:
    logger = logging.getLogger("dist_train")
    return {
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "environment": {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
        "path": list(sys.path),
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "generators": generator_states(),
        "logging": (logger.level, logger.propagate, list(logger.handlers)),
        "warnings": warnings.showwarning,
        "accelerate": dict(AcceleratorState._shared_state),
    }


@pytest.fixture
def unchanged_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Check that the test leaves the process unchanged."""
    monkeypatch.chdir(tmp_path)
    before = state_of_the_process()
    yield
    wait_until(
        lambda: all(each.name != "tracking" for each in threading.enumerate()), "end of a tracker", patience_s=60
    )
    assert state_of_the_process() == before


@pytest.mark.usefixtures("unchanged_process")
def test_two_runs_with_different_dtypes() -> None:
    first = train(settings("mixed_precision=bf16"), run_name="first")
    assert (first.state, first.run_dir) == ("FINISHED", Path("runs/first").absolute())
    assert first.metrics["mixed_precision"] == "bf16"
    second = train(settings("dtype=float64"))
    assert second.metrics["mixed_precision"] == "no"
    assert {parameter.dtype for parameter in second.net.parameters()} == {torch.float64}
    assert not second.net.training


@pytest.mark.usefixtures("unchanged_process")
def test_finished_run_is_returned_unchanged() -> None:
    first = train(settings(), run_name="r")
    again = train(settings(), run_name="r")
    assert (again.state, again.metrics) == (first.state, first.metrics)
    with pytest.raises(ConfigError, match="belongs to a run with other settings"):
        train(settings("seed=1"), run_name="r")


@pytest.mark.usefixtures("unchanged_process")
def test_finished_run_is_extended() -> None:
    constant = "schedule={name: constant}"
    train(settings(constant), run_name="r")
    config = settings(constant, "train_for=6 steps")
    longer = train(config, run_name="r", extend=True)
    assert (longer.state, longer.metrics["step"]) == ("FINISHED", 6)
    assert train_losses(longer.run_dir) == train_losses(train(config, run_name="whole").run_dir)
    with pytest.raises(ConfigError, match="Pass its run_name"):
        train(config, extend=True)


@pytest.mark.usefixtures("unchanged_process")
def test_failure_leaves_process_unchanged() -> None:
    kept = []  # as a notebook keeps the last traceback, and with it all objects of the run
    for _ in range(2):
        with pytest.raises(TrainingDiverged, match=r"Lower optimizer\.lr") as found:
            train(settings("optimizer.lr=1e30"), run_name="diverged")
        kept.append(found)
    with pytest.raises(DataError):
        train(settings("data.name=fashion_mnist", "data.root=nowhere/to/be/found"))
    with pytest.raises(UserCodeError, match="nobody"):
        train(settings("model.name=nobody:Net"))
    with pytest.raises(ConfigError, match="nproc=0"):
        train(settings(), nproc=0)
    assert [path.name for path in Path("runs").iterdir()] == ["diverged"]  # the others would hold only the error
    assert train(settings()).state == "FINISHED"


@pytest.mark.usefixtures("unchanged_process")
def test_new_run_in_job_is_named_by_time() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_JOB_ID", "77")
        assert train(settings()).run_dir != train(settings("seed=1")).run_dir


@pytest.mark.usefixtures("unchanged_process")
def test_second_ctrl_c_raises_keyboard_interrupt() -> None:
    timer = threading.Thread(target=_interrupt_once_it_trains, kwargs={"times": 2})
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        train(settings("model.name=support.user_nets:Gated", "model.args.slow_s=5.0"), run_name="r")
    timer.join()


@pytest.mark.usefixtures("unchanged_process")
def test_failed_run_is_closed_in_wandb() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        with pytest.raises(TrainingDiverged):
            train(settings("optimizer.lr=1e30"), run_name="a")
        train(settings(), run_name="b")
    assert [len(list(Path(f"runs/{name}/wandb").glob("offline-run-*"))) for name in "ab"] == [1, 1]


@pytest.mark.usefixtures("unchanged_process")
def test_second_training_thread_is_refused() -> None:
    config, found = settings("model.name=support.user_nets:Gated"), []
    thread = threading.Thread(target=lambda: found.append(train(config, run_name="r")))
    thread.start()
    wait_until(lambda: Path("runs/r/status.json").exists() or not thread.is_alive(), "training")
    with pytest.raises(LaunchError, match="Another thread of this process is training"):
        train(settings())
    Path(OPEN).touch()
    thread.join(PATIENCE_S)
    assert found[0].state == "FINISHED"


@pytest.mark.usefixtures("unchanged_process")
def test_timer_and_accelerator_of_script_are_kept(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    with (tmp_path / "stacks").open("w") as file:
        faulthandler.dump_traceback_later(0.2, repeat=True, file=file)
        train(settings("mixed_precision=bf16"))
        size = (tmp_path / "stacks").stat().st_size
        wait_until(lambda: (tmp_path / "stacks").stat().st_size > size, "dump by the script's own timer", patience_s=60)
        faulthandler.cancel_dump_traceback_later()
    assert accelerator.state.mixed_precision == "no"
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("unchanged_process")
def test_ctrl_c_saves_and_same_call_resumes() -> None:
    config = settings(
        "model.name=support.user_nets:Gated", "model.args.slow_s=1.0", "train_for=12 steps", "log_every=1"
    )
    timer = threading.Thread(target=_interrupt_once_it_trains)
    timer.start()
    stopped = train(config, run_name="r")
    timer.join()
    assert (stopped.state, stopped.metrics) == ("INTERRUPT", {})
    assert train(config, run_name="r").state == "FINISHED"
    whole = train(config, run_name="whole")
    assert train_losses(stopped.run_dir) == train_losses(whole.run_dir)


def _interrupt_once_it_trains(times: int = 1) -> None:
    status_file = Path("runs/r/status.json")
    wait_until(lambda: status_file.exists() and read_json(status_file).get("step"), "first step")
    began = read_json(status_file)["step"]
    wait_until(lambda: read_json(status_file)["step"] > began, "next step")  # it has just begun: all signals reach it
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)  # signals that are pending together are one
    Path(OPEN).touch()


@pytest.mark.usefixtures("unchanged_process")
def test_several_processes() -> None:
    result = train(settings(), nproc=2, run_name="two")
    assert (result.state, result.metrics["world_size"]) == ("FINISHED", 2)
    assert sum(parameter.numel() for parameter in result.net.parameters()) > 0
    with pytest.raises(ConfigError, match=r"global_batch_size=96 is not a multiple of world_size=5"):
        train(settings(), nproc=5)
    for section in ("model", "optimizer"):
        with pytest.raises(ConfigError, match=rf"{section}\.name=__main__:Own and nproc=2: .* mine:Own"):
            train(settings(f"{section}.name=__main__:Own", "optimizer.betas="), nproc=2)
    assert [path.name for path in Path("runs").iterdir()] == ["two"]


def test_train_inside_distributed_world_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "h", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(LaunchError, match="this is rank 1 of 2"):
        train(settings())


def test_importing_package_imports_nothing_heavy() -> None:
    code = "import sys, dist_train; print({'torch', 'click', 'pydantic', 'dist_train.launch'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
