"""Timing of the training steps."""

from __future__ import annotations

import time


class StepTimer:
    """Total seconds inside training steps, and the speed of the latest ones. Synchronise the device before reading."""

    def __init__(self, total_s: float = 0.0) -> None:
        self.total_s = total_s
        self._started: float | None = None
        self.start_window(0, 0.0)

    def start(self) -> None:
        """Start the timer unless it is running."""
        if self._started is None:
            self._started = time.perf_counter()

    def stop(self) -> None:
        """Stop the timer and add the time to `total_s`."""
        self.total_s = self.now_s()
        self._started = None

    def start_window(self, step: int, data_wait_s: float) -> None:
        """Start the window that `measure` covers."""
        self._window_start = self.now_s(), step, data_wait_s

    def measure(self, step: int, data_wait_s: float, global_batch_size: int) -> dict[str, float]:
        """Return the perf/... metrics of the window, {} if it has no step."""
        since_s, since_step, since_wait_s = self._window_start
        seconds, steps = self.now_s() - since_s, step - since_step
        if not steps:
            return {}
        return {
            "perf/samples_per_s": round(steps * global_batch_size / seconds, 1),
            "perf/step_time_ms": round(1000 * seconds / steps, 4),
            "perf/data_wait_ms": round(1000 * (data_wait_s - since_wait_s) / steps, 4),
        }

    def now_s(self) -> float:
        """Return the total seconds, up to now if the timer is running."""
        return self.total_s + (time.perf_counter() - self._started if self._started is not None else 0.0)
