"""An early stopped run has all its metric lines, each once, even if it was interrupted before."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dist_train.atomic_files import to_json
from dist_train.checkpoints import manager as checkpoints
from dist_train.checkpoints.contents import TrainerState
from dist_train.checkpoints.storage import Stateful
from dist_train.cli import main
from dist_train.training import trainer as train
from support.once import made_once
from support.processes import DIST_TRAIN
from support.ranks import run_forked, run_on_ranks, train_here, train_on_ranks
from support.run_files import assert_bit_identical, metrics, status

# Stops at step 8, where neither a `train` line nor the end of an epoch (6 steps) is due.
STOPS_AT = 8
SETTINGS: dict[str, Any] = {
    "data": {"name": "support.user_sets:Jittered"}, "model": {"name": "support.user_sets:WithDropout"},
    "global_batch_size": 16, "log_every": 5, "eval_every": "4 steps", "train_for": "500 epochs", "device": "cpu",
    "early_stop": {"patience": 1, "min_delta": 0.5},
}  # fmt: skip


@pytest.fixture
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "early stop", lambda folder: train_on_ranks(SETTINGS, folder / "r")) / "r"


def test_accuracy_undefined_in_some_evaluations(tmp_path: Path) -> None:
    """It is neither the best nor a gain, and never makes the loss decide. An accuracy of the net's own is nowhere shown
    as a share of correct examples."""
    own = {
        "data": {"name": "support.user_sets:mnist_part"}, "model": {"name": "support.user_nets:Scoring"},
        "eval_every": "2 steps", "early_stop": {"patience": 3}, "final_train_eval": False,
    }  # fmt: skip
    train_on_ranks(SETTINGS | own, tmp_path / "r")
    accuracies = {line["step"]: line.get("val/accuracy") for line in metrics(tmp_path / "r") if "val/loss" in line}
    assert accuracies == {2: None, 4: 1 / 2, 6: None, 8: 1 / 4, 10: 1 / 5}
    result = json.loads((tmp_path / "r/result.json").read_text())
    assert (result["early_stopped"], result["best/step"], result["best/accuracy"]) == (True, 4, 0.5)
    assert (tmp_path / "r/checkpoints/best").resolve().name == "step_00000004"
    log = (tmp_path / "r/logs/rank_00000.log").read_text()
    assert re.findall(r"accuracy ([^ \n]*)", log) == ["0.5", "0.25", "0.2", "0.2", "0.166667"]
    for command in (["ls", "--in", str(tmp_path)], ["compare", str(tmp_path / "r")]):
        row = CliRunner().invoke(main, ["runs", *command]).output.splitlines()[1].split()
        assert {"0.5", "0.166667"} <= {*row}, row
    done = run_forked([*DIST_TRAIN, "evaluate", "r", "--json"], tmp_path)
    assert json.loads(done.stdout).keys() == {"step", "loss", "seen"}


@pytest.mark.parametrize(
    ("evaluations", "scores", "best"),
    [
        ([(-9.0, math.nan), (1.0, 0.5), (-9.0, math.nan), (1.0, 0.4)], [None, 0.5, None, 0.4], 2),
        ([(1.0, 0.5), (-9.0, None), (1.0, 0.6), (1.0, math.inf)], [0.5, None, 0.6, None], 3),
        ([(1.0, None), (2.0, 0.9), (0.5, None)], [-1.0, -2.0, -0.5], 3),
        ([(-9.0, math.nan), (-9.0, math.nan)], [None, None], None),
    ],
    ids=["now and then", "not always returned", "the loss first", "never"],
)
def test_same_metric_decides_throughout_run(
    evaluations: list[tuple[float, float | None]], scores: list[float | None], best: int | None
) -> None:
    """Also if each evaluation is in a separate attempt."""
    state, found_scores, without_gain = TrainerState(), [], 0
    for step, (loss, accuracy) in enumerate(evaluations, start=1):
        state.step = step
        metrics = {"val/loss": loss} if accuracy is None else {"val/loss": loss, "val/accuracy": accuracy}
        state.record_evaluation(metrics, min_delta=0.0)
        without_gain = 0 if state.is_best else without_gain + 1
        assert state.evaluations_without_gain == without_gain
        found_scores.append(state.score)
        state = TrainerState(**json.loads(to_json(asdict(state))))
    assert found_scores == scores
    assert state.best.get("step") == best


def test_choice_by_the_reported_split_is_named(undisturbed: Path, tmp_path: Path) -> None:
    said = "the test split that is reported at the end; data.val_examples=10 holds out others to choose by"
    held_out = tmp_path / "held_out"
    train_on_ranks(SETTINGS | {"data": SETTINGS["data"] | {"val_examples": 10}}, held_out)
    for run, is_said in ((undisturbed, True), (held_out, False)):
        assert (f"early_stop chooses by {said}" in (run / "logs/rank_00000.log").read_text()) == is_said
    for run, which, is_said in ((undisturbed, "best", True), (undisturbed, "last", False), (held_out, "best", False)):
        done = run_forked([*DIST_TRAIN, "evaluate", str(run), "--checkpoint", which], tmp_path)
        assert done.returncode == 0
        assert (f"The best checkpoint was chosen by {said}" in done.stderr) == is_said


def test_early_stop_writes_all_lines(tmp_path: Path) -> None:
    train_on_ranks(SETTINGS, tmp_path, world_size=2)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["early_stopped"], result["step"], result["best/step"]) == (True, STOPS_AT, 4)
    lines = metrics(tmp_path)
    steps = {
        kind: [line["step"] for line in lines if kind in line] for kind in ("train/loss", "val/loss", "audit/unique")
    }
    assert steps == {"train/loss": [5, 8], "val/loss": [4, 8], "audit/unique": [6, 8]}
    assert [line["audit/unique"] for line in lines if "audit/unique" in line] == [6 * 16, 2 * 16]


def stop_during_evaluation() -> None:
    evaluate = train.Trainer.evaluate

    def evaluate_with_stop(self: train.Trainer) -> None:
        if self.state.step == STOPS_AT:
            self.agreement.tick = lambda *_: setattr(self.agreement, "stop", "INTERRUPT")  # type: ignore[method-assign]
        evaluate(self)

    train.Trainer.evaluate = evaluate_with_stop  # type: ignore[method-assign]


def kill_before_the_save() -> None:
    save = checkpoints.Checkpoints.save

    def killed(self: checkpoints.Checkpoints, state: TrainerState, step: Stateful) -> None:
        if state.step == STOPS_AT:
            os._exit(9)
        save(self, state, step)

    checkpoints.Checkpoints.save = killed  # type: ignore[method-assign]


def kill_after_the_save() -> None:
    finish = checkpoints.Checkpoints.finish

    def killed(self: checkpoints.Checkpoints) -> None:
        finish(self)
        os._exit(9)

    checkpoints.Checkpoints.finish = killed  # type: ignore[method-assign]


def disturbed(how: Callable[[], None], run_dir: Path) -> None:
    how()
    train_here(SETTINGS, run_dir)


@pytest.mark.parametrize(
    ("how", "left"),
    [(stop_during_evaluation, "INTERRUPT"), (kill_before_the_save, "EVALUATED"), (kill_after_the_save, "SAVING")],
)
def test_interrupted_early_stop_writes_each_line_once(
    how: Callable[[], None], left: str, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "r"
    with nullcontext() if left == "INTERRUPT" else pytest.raises(AssertionError, match=r"exit codes \[9\]"):
        run_on_ranks(disturbed, how, run_dir, world_size=1)
    assert status(run_dir) == left
    train_on_ranks(SETTINGS, run_dir)
    assert_bit_identical(run_dir, undisturbed)
