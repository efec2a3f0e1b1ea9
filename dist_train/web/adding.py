"""What is being added to the library: one after the other, each unpacked and read by a child process."""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from dist_train.errors import DistTrainError, LibraryError
from dist_train.launch.subprocesses import limited_lines_of
from dist_train.user_code.library import Kind, Version, find, remove_unfinished

_SHOWN_S = 3600.0  # for which a failure stays on the page


@dataclass
class Task:
    kind: Kind
    name: str
    arguments: Sequence[str]
    at_end: Callable[[], object]  # called once it is added
    done: int = 0  # bytes unpacked
    total: int = 0  # 0: not known yet
    error: str | None = None
    ended: float | None = None
    is_cancelled: bool = False
    version: Future[Version] = field(default_factory=Future)


class Adding:
    """The tasks, the oldest first, and the thread that works at them. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tasks: list[Task] = []
        self._waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
        self._boot, self._number = uuid4().hex[:8], 0
        threading.Thread(target=self._work, name="adding", daemon=True).start()

    @property
    def version(self) -> str:
        """What changes with what the tasks have done; unlike that of an earlier server."""
        return f"{self._boot}.{self._number}"

    def begin(self, task: Task) -> None:
        task.version.set_running_or_notify_cancel()  # who waits for it can only stop waiting
        with self._lock:
            self._tasks.append(task)
        self._number += 1
        self._waiting.put(task)

    def tasks(self, kind: Kind) -> list[Task]:
        """Return those of a kind that wait, are worked at, or failed not long ago."""
        with self._lock:
            self._tasks = [
                task for task in self._tasks
                if task.ended is None or (task.error and time.time() - task.ended < _SHOWN_S)
            ]  # fmt: skip
            return [task for task in self._tasks if task.kind == kind]

    def cancel(self, kind: Kind, name: str) -> None:
        """End what is being added under a name, or forget that it failed."""
        for task in self.tasks(kind):
            if task.name == name:
                task.is_cancelled, task.error = True, None
        self._number += 1

    def _work(self) -> None:
        with suppress(OSError):
            remove_unfinished()  # left by a server that was killed
        while True:
            task = self._waiting.get()
            try:
                version = self._add(task)
                task.at_end()
            except (DistTrainError, OSError) as error:
                task.error = None if task.is_cancelled else str(error)
                with suppress(DistTrainError, OSError):
                    remove_unfinished(task.kind, task.name)
                task.version.set_exception(error)
            else:
                task.version.set_result(version)
            task.ended = time.time()
            self._number += 1

    def _add(self, task: Task) -> Version:
        if task.is_cancelled:
            raise LibraryError("It was cancelled.")
        line = ""
        with closing(limited_lines_of("library", "add", task.kind, task.name, *task.arguments, "--progress")) as lines:
            for line in lines:
                if task.is_cancelled:
                    raise LibraryError("It was cancelled.")
                if found := re.fullmatch(r"(\d+) (\d+)\n", line):
                    task.done, task.total = int(found[1]), int(found[2])
                    self._number += 1
        return find(task.kind, task.name, Path(line.rstrip("\n")).parent.name)  # the path of its files comes last
