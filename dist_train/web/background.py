"""Questions whose answers may take long, such as those to Slurm: a page never waits for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

Answer = TypeVar("Answer")


class Background(Generic[Answer]):
    """The last answer to a question. Safe to use from several threads.

    `ask` gets the last answer, then the arguments of `latest`, and returns the new one.
    """

    def __init__(self, ask: Callable[..., Answer], first: Answer, every_s: float) -> None:
        self.answer = first
        self.version = 0  # changes with the answer
        self._ask = ask
        self._every_s = every_s
        self._asked = -every_s
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def latest(self, *arguments: Any) -> Answer:
        """Return the last answer at once; ask again if that was asked for more than `every_s` ago."""
        with self._lock:
            is_old = time.monotonic() - self._asked >= self._every_s
            if is_old and (self._thread is None or not self._thread.is_alive()):  # one question at a time
                self._asked = time.monotonic()
                self._thread = threading.Thread(target=self._run, args=arguments, name="background", daemon=True)
                self._thread.start()
            return self.answer

    def _run(self, *arguments: Any) -> None:
        before = self.answer
        self.answer = self._ask(before, *arguments)
        self.version += self.answer != before
