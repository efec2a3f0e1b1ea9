"""Where a run is: its step, its best result and its clocks, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class TrainState:
    """Where the run is, as plain numbers. The learning rate and the data order follow from `step`."""

    step: int = 0
    logged_step: int = 0  # of the last `train` line: losses up to here were finite
    evaluation_pending: bool = False  # a stop cut it short: done again after the resume
    val: dict[str, float] = field(default_factory=dict)  # the last evaluation: val/loss, val/accuracy, ..., its step
    best: dict[str, float] = field(default_factory=dict)  # the best one
    gain_from: float | None = None  # the score that early stopping compares with
    evaluations_without_gain: int = 0
    train_s: float = 0.0  # seconds inside training steps, over all attempts
    total_s: float = 0.0  # seconds since the process started, over all attempts
    audit: dict[str, int] = field(default_factory=dict)  # totals of the epoch under way; an older version kept none

    @property
    def is_best(self) -> bool:
        return bool(self.best) and self.best["step"] == self.step

    def note_evaluation(self, metrics: dict[str, float], min_delta: float) -> None:
        """Remember an evaluation done at `step` (keys val/...)."""
        self.evaluation_pending = False
        self.val = {**metrics, "step": self.step}
        score = score_of(metrics)
        if not self.best or score > score_of(self.best):
            self.best = self.val
        if self.gain_from is None or score > self.gain_from + min_delta:
            self.gain_from, self.evaluations_without_gain = score, 0
        else:
            self.evaluations_without_gain += 1


def score_of(metrics: dict[str, float]) -> float:
    """Higher is better: accuracy where it can be counted, else the negative loss."""
    return metrics.get("val/accuracy", -metrics["val/loss"])
