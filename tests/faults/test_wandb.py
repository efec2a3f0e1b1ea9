"""A failing W&B server does not disturb the run. The client is real, the server is a stand-in."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from support.patience import wait_until
from support.processes import DIST_TRAIN, run, started
from support.run_files import assert_bit_identical, metrics, step_of
from support.trainings import STEPS, release, train
from support.wandb_server import Behaviour, WandbServer

TABLE, COLUMNS = "environment faults", ("fault", "outcome", "seconds until exit", "verified")
AT_START: list[Behaviour | None] = [None, "hangs", "rejects the API key"]
MID_RUN: list[Behaviour | None] = [None, "hangs", "answers with 500"]  # None: the server stops listening


def sync(folder: Path, history_of: Path, *, cut_off: bool = False) -> None:
    """Check that `wandb sync` delivers every line of the run's metrics, with the lines of one step merged.

    For a run that was `cut_off` while online, W&B confirms the delivery only sometimes.
    """
    command = [*DIST_TRAIN, "wandb", "sync", "runs/r"]
    with WandbServer("rejects the API key") as server:
        refused = run(command, folder, **server.env)
        assert refused.returncode == 1
        assert "has not confirmed" in refused.stderr
    with WandbServer() as server:
        done = run(command, folder, **server.env)
        assert done.returncode in ((0, 1) if cut_off else (0,)), done.stdout + done.stderr
        same_history(server, history_of)


def same_history(server: WandbServer, run_dir: Path) -> None:
    expected: dict[int, dict[str, object]] = {}
    for line in metrics(run_dir):
        expected.setdefault(line["step"], {}).update({key: value for key, value in line.items() if value is not None})
    delivered = [{key: value for key, value in row.items() if not key.startswith("_")} for row in server.history]
    assert delivered == list(expected.values())


@pytest.mark.parametrize("behaviour", AT_START)
def test_wandb_unreachable_at_start(
    behaviour: Behaviour | None, undisturbed_alone: Path, tmp_path: Path, row: Callable[..., None]
) -> None:
    with WandbServer(behaviour or "answers") as server:
        if behaviour is None:
            server.die()
        began = time.monotonic()
        with started(
            train("tracking.timeout_s=20", "model.args.slow_s=3", nproc=None), tmp_path, None, **server.env
        ) as process:
            wait_until(lambda: any((tmp_path / "runs/r/wandb").glob("offline-run-*")), "record offline")
            release(tmp_path)
            out, err = process.communicate()
        seconds = time.monotonic() - began
    assert process.returncode == 0, err
    assert "Traceback" not in out + err
    assert "W&B cannot be reached" in out
    assert_bit_identical(tmp_path / "runs/r", undisturbed_alone)
    sync(tmp_path, tmp_path / "runs/r")
    what = f"W&B {behaviour}" if behaviour else "W&B's port refuses connections"
    row(what, "finishes normally, recorded offline, delivered later", f"{seconds:.0f}", "to the bit")


def is_tracked(server: WandbServer, run_dir: Path) -> bool:
    return bool(server.runs) and step_of(run_dir) > 0


def test_wandb_fails_mid_run(
    count: Callable[[int], int], undisturbed: Path, tmp_path: Path, row: Callable[..., None]
) -> None:
    for number, behaviour in enumerate(MID_RUN[: count(len(MID_RUN))]):
        folder = tmp_path / str(number)
        folder.mkdir()
        with WandbServer() as server, started(train(), folder, None, **server.env) as process:
            began = time.monotonic()
            wait_until(partial(is_tracked, server, folder / "runs/r"), "training")
            if behaviour is None:
                server.die()
            else:
                server.behaviour = behaviour
            release(folder)
            out, err = process.communicate()
            seconds = time.monotonic() - began
        assert process.returncode == 0, err
        assert "Traceback" not in out + err
        assert f"dist-train wandb sync {folder / 'runs/r'}" in out
        assert_bit_identical(folder / "runs/r", undisturbed)
        sync(folder, folder / "runs/r", cut_off=True)
        what = f"W&B {behaviour} from mid-run on" if behaviour else "W&B's server stops mid-run"
        row(what, "finishes normally, waits 60 s for W&B, delivered later", f"{seconds:.0f}", "to the bit")


def test_wandb_receives_resumed_run_once(tmp_path: Path) -> None:
    """Online, stopped and resumed: one W&B run, and each line once."""
    with WandbServer() as server:
        with started(train(nproc=None), tmp_path, None, **server.env) as process:
            wait_until(lambda: step_of(tmp_path / "runs/r") >= 10, "training")
            process.send_signal(signal.SIGTERM)
            process.communicate()
        half = len(server.history)
        release(tmp_path)
        done = run(train(nproc=None), tmp_path, **server.env)
        assert done.returncode == 0, done.stderr
        assert half < STEPS // 4  # lines
        assert len(server.runs) == 1
        same_history(server, tmp_path / "runs/r")
