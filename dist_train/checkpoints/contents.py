"""What a checkpoint holds. It is the folder `checkpoints/step_00001200/` with

model.safetensors  the weights that are evaluated (averaged ones with ema_decay)
training.pt        optimizer, scaler, the raw weights if averaged, window sums; read without executing code
state.json         `TrainerState`: step, best result, clocks
manifest.json      step, run, metrics, size and SHA-256 of the other three, and its own SHA-256; written last
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dist_train.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
MODEL, TRAINING, STATE, MANIFEST = "model.safetensors", "training.pt", "state.json", "manifest.json"


@dataclass(frozen=True)
class Snapshot:
    """A copy of the full state on the CPU: training can continue while it is written."""

    state: TrainerState
    model: dict[str, Tensor]
    training: dict[str, Any]  # of `Step.state_dict`


@dataclass
class TrainerState:
    """The state of a run as plain numbers. The learning rate and the data order are functions of `step`."""

    step: int = 0
    logged_step: int = 0  # of the last `train` line: losses up to here were finite
    evaluation_pending: bool = False  # a stop interrupted the evaluation: it is repeated after the resume
    val: dict[str, float] = field(default_factory=dict)  # the last evaluation: val/loss, val/accuracy, ..., its step
    best: dict[str, float] = field(default_factory=dict)  # the best evaluation
    best_by: str | None = None  # the deciding metric; None: val/accuracy, or val/loss if there is none
    best_mode: str | None = None  # whether the max or the min of `best_by` is the best
    gain_from: float | None = None  # the score that early stopping compares with
    evaluations_without_gain: int = 0
    train_s: float = 0.0  # seconds inside training steps, over all attempts
    total_s: float = 0.0  # seconds since the process started, over all attempts
    audit: dict[str, int] = field(default_factory=dict)  # totals of the current epoch; older versions kept none

    @property
    def is_best(self) -> bool:
        return bool(self.best) and self.best["step"] == self.step

    @property
    def score(self) -> float | None:
        """The score of the current weights, higher is better. None if they were not evaluated or it is not finite."""
        if not self.best or self.val["step"] != self.step:
            return None
        score = self._score_of(self.val)
        return score if math.isfinite(score) else None

    def record_evaluation(self, metrics: dict[str, float], min_delta: float) -> None:
        """Record the finite metrics (keys val/...) of an evaluation at `step`.

        Raises:
            ConfigError: `best_by` is none of them.
        """
        if self.best_by is not None and self.best_by not in metrics:
            raise ConfigError(
                f"best_by={self.best_by}: the evaluations have {', '.join(sorted(metrics))}. Name one of them, or add "
                f"it to metrics."
            )
        self.evaluation_pending = False
        score = self._score_of(metrics)
        self.val = {name: value for name, value in metrics.items() if math.isfinite(value)} | {"step": self.step}
        if score > self._score_of(self.best):
            self.best = self.val
        if score > (-math.inf if self.gain_from is None else self.gain_from + min_delta):
            self.gain_from, self.evaluations_without_gain = score, 0
        else:
            self.evaluations_without_gain += 1

    def _score_of(self, metrics: dict[str, float]) -> float:
        """Return the run's one deciding metric, negative if lower is better. -inf if undefined."""
        name, mode = self.best_by, self.best_mode
        if name is None:
            name, mode = ("val/accuracy", "max") if "val/accuracy" in (self.best or metrics) else ("val/loss", "min")
        score = (1 if mode == "max" else -1) * metrics.get(name, math.nan)
        return score if math.isfinite(score) else -math.inf
