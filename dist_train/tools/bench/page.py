"""The page of runs as its users have it: a server in a process of its own, runs to show, and tabs that poll."""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import psutil

from dist_train.config.loading import parse_config
from dist_train.errors import LaunchError
from dist_train.launch.subprocesses import running
from dist_train.runs.attempt import begin_attempt
from dist_train.runs.directory import RunDir

_PATIENCE_S = 300.0  # for an answer


class Tab:
    """A list of runs in a browser: one connection, and the version that it shows."""

    def __init__(self, address: str) -> None:
        url = urlsplit(address)
        self._connection = HTTPConnection(url.netloc, timeout=_PATIENCE_S)
        self._headers = {"Authorization": f"token {parse_qs(url.query)['token'][0]}"}
        self._version = ""
        self.content = ""  # the last one that was not empty

    def get(self, path: str) -> float:
        """Return the seconds until the whole answer was there."""
        began = time.perf_counter()
        self._connection.request("GET", path, headers=self._headers)
        answer = self._connection.getresponse()
        self.content = answer.read().decode() or self.content
        if answer.status not in (200, 204):
            raise LaunchError(f"dist-train web answered {path} with {answer.status}.")
        return time.perf_counter() - began

    def poll(self) -> float:
        """Ask for the rows if they have changed, as the page does once a second."""
        seconds = self.get(f"/rows?since={self._version}")
        self._version = re.findall(r'rows\?since=([^&"]+)', self.content)[0]
        return seconds

    def close(self) -> None:
        self._connection.close()


@contextmanager
def server(folder: Path) -> Iterator[tuple[psutil.Process, Callable[[], Tab]]]:
    """Serve the runs in `folder`; yield the process, and a function that opens a tab."""
    with tempfile.TemporaryDirectory() as own:
        log = Path(own) / "log"
        arguments = ["web", "--in", str(folder), "--port", "0"]
        has_begun, environment = lambda: "\n" in log.read_text(), {"XDG_STATE_HOME": own}
        with (
            running(*arguments, log=log, has_begun=has_begun, environment=environment) as pid,
            ExitStack() as tabs,
        ):
            address = log.read_text().splitlines()[0]
            yield psutil.Process(pid), lambda: tabs.enter_context(closing(Tab(address)))


def write_runs(folder: Path, count: int) -> None:
    """Write `count` runs: two of them at work, of ten others one failed, one interrupted and eight finished."""
    states = ["FINISHED"] * 8 + ["ERROR", "INTERRUPT"]
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as patterns:
        for state in ("TRAINING", *states[7:]):
            _write_run(RunDir(Path(patterns) / state), state)
        for number in range(count):
            state = "TRAINING" if number < 2 else states[number % 10]
            shutil.copytree(Path(patterns) / state, folder / f"run-{number:05d}")


def _write_run(run_dir: RunDir, state: Any) -> None:
    run_dir.create()
    begin_attempt(run_dir, parse_config({}), "id")
    best = {"val/loss": 0.1, "val/accuracy": 0.98}
    metrics = best | {"train/loss": 0.1, "train/accuracy": 0.97, "train/lr": 0.1, "perf/samples_per_s": 1e4}
    run_dir.status.update(state=state, step=937, total_steps=4685, epoch=1.0, world_size=2, best=best, metrics=metrics)
    if state == "FINISHED":
        by_class = {f"class {number}": 0.97 for number in range(10)}
        run_dir.write_result({"state": state, "test/accuracy": 0.97, "test/accuracy_by_class": by_class})


def poll(tabs: Sequence[Tab], seconds: float, after: Callable[[], object] = lambda: None) -> None:
    """Let each tab poll once a second, in turns."""
    end = time.monotonic() + seconds
    while (now := time.monotonic()) < end:
        for tab in tabs:
            tab.poll()
            after()
            now += 1 / len(tabs)
            time.sleep(max(0.0, now - time.monotonic()))
        if not tabs:
            time.sleep(seconds)


def percent_of_core(
    process: psutil.Process, tabs: Sequence[Tab], seconds: float, after: Callable[[], object] = lambda: None
) -> float:
    """Return the share of a core that the server takes while the tabs poll."""
    before = process.cpu_times()
    poll(tabs, seconds, after)
    times = process.cpu_times()
    return 100 * (times.user + times.system - before.user - before.system) / seconds
