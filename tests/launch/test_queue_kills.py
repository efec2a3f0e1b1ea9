"""SIGKILL of the server, the keeper, a launcher or a training: each job is begun once, in order, and none is lost.

Prints the table of docs/queue.md. A part runs by default; all with --full (make web-full).
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import cycle, islice
from pathlib import Path

import pytest

from dist_train.config.loading import load_config
from dist_train.launch.job_queue import create_job, enqueue, ensure_keeper, waiting_jobs
from dist_train.launch.resume import resume
from dist_train.runs import kernel_lock
from dist_train.runs.directory import RunDir
from dist_train.runs.start_lock import is_starting
from dist_train.runs.summary import summarise
from support.once import made_once
from support.patience import wait_until
from support.processes import DIST_TRAIN, alive, command_of
from support.queue_jobs import queued, trace
from support.ranks import run_forked
from support.run_files import assert_bit_identical

TABLE = "kills of the queue"
COLUMNS = ("killed", "where", "kills", "what followed")

KILLER = Path(__file__).parent / "line_killer"
SETTINGS = """
data: {name: "support.user_sets:Jittered"}
model: {name: "support.user_sets:WithDropout"}
device: cpu
seed: 0
global_batch_size: 12
train_for: 60 steps
log_every: 5
save_every: 5 steps
eval_every: 0
final_train_eval: false
tracking: {pictures: false}
"""


@pytest.fixture(autouse=True)
def _in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    path = os.pathsep.join([str(KILLER), os.environ["PYTHONPATH"]])
    monkeypatch.setenv("PYTHONPATH", path)
    yield
    while pids := begun_in(tmp_path):  # a keeper may begin another job meanwhile
        for pid in pids:
            kill(pid)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        (folder / "settings.yaml").write_text(SETTINGS)
        done = run_forked([*DIST_TRAIN, "train", "-c", "settings.yaml", "--run-name=r"], folder)
        assert done.returncode == 0, done.stderr

    return made_once(tmp_path_factory, "training of the queue", make) / "runs/r"


def begun_in(folder: Path) -> list[int]:
    return [pid for pid in alive(folder) if pid != os.getpid()]


def kill(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def armed(folder: Path, role: str, nth: int) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "lines").unlink(missing_ok=True)
    return json.dumps({"role": role, "nth": nth, "folder": str(folder)})


def lines_reached(folder: Path) -> int:
    path = folder / "lines"
    return len(path.read_text().splitlines()) if path.exists() else 0


def training_job(folder: Path, name: str) -> RunDir:
    (folder / "settings.yaml").write_text(SETTINGS)
    run_dir = RunDir(folder / "runs" / name)
    create_job(run_dir, load_config("settings.yaml"), nproc=1)
    enqueue(run_dir.path)
    return run_dir


def state(run_dir: RunDir) -> str:
    return summarise(run_dir.path).state


def begin_times(jobs: list[RunDir]) -> list[float]:
    return [job.read_job()["begun"] for job in jobs]


# --- at each line ----------------------------------------------------------------------------------------------------


def kill_keeper_at(nth: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> bool | None:
    """Kill the keeper at its `nth` line; the next one goes on. Return whether a job was begun without a launcher, None
    if the keeper ended before that line."""
    folder.mkdir()
    (folder / "go").touch()
    monkeypatch.chdir(folder)
    jobs = queued(folder, "a", "b")
    monkeypatch.setenv("LINE_KILL", armed(folder / "killed", "keeper", nth))
    ensure_keeper(folder / "runs")
    lock = folder / "runs" / f".queue.{socket.gethostname()}.lock"
    wait_until(lambda: not kernel_lock.is_held(lock), "end of the keeper")
    monkeypatch.delenv("LINE_KILL")
    if lines_reached(folder / "killed") < nth:
        return None
    ensure_keeper(folder / "runs")
    wait_until(lambda: not begun_in(folder), "end of the next keeper")
    assert waiting_jobs(folder / "runs") == []
    assert begin_times(jobs) == sorted(begin_times(jobs))
    begun = [line for line in trace(folder) if line.startswith("begin")]
    assert begun in (["begin a", "begin b"], ["begin a"], ["begin b"])  # none twice, in order
    for job in jobs:
        if f"begin {job.path.name}" not in begun:
            assert state(job) == "KILLED"
            resume(job.path)
            wait_until(lambda: f"end {job.path.name}" in trace(folder), "end after going on")  # noqa: B023
    return len(begun) < 2


def keepers(folder: Path) -> list[int]:
    return [pid for pid in alive(folder) if "queue work" in command_of(pid)]


@pytest.mark.parametrize("nth", random.Random(0).sample(range(110, 150), 2))
def test_keeper_killed_at_line(nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kill_keeper_at(nth, tmp_path / "queue", monkeypatch) is not None


@pytest.mark.full
@pytest.mark.timeout(5400)
def test_keeper_killed_at_each_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Callable[..., None]) -> None:
    nth, without_launcher = 1, 0
    while (found := kill_keeper_at(nth, tmp_path / f"{nth}", monkeypatch)) is not None:
        nth, without_launcher = nth + 1, without_launcher + found
    assert nth > 100
    what = f"each job begun once, in order; {without_launcher} of them before their launcher was: KILLED, then *Go on*"
    row("keeper", "each line from its look at the queue to its end", nth - 1, what)


@pytest.mark.full
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("role", ["launcher", "rank"])
def test_killed_at_each_line_before_the_first_status(
    role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Path, row: Callable[..., None]
) -> None:
    """One run, begun by the keeper and then gone on with, is killed at each start; the last start ends it."""
    run_dir, nth = training_job(tmp_path, "r"), 1
    blocked = training_job(tmp_path, "behind")
    monkeypatch.setenv("LINE_KILL", armed(tmp_path / "killed", role, nth))
    ensure_keeper(tmp_path / "runs")
    wait_until(lambda: "begun" in blocked.read_job(), "the job behind it")
    while True:
        wait_until(lambda: not is_starting(run_dir) and not ranks_of("r", tmp_path), "end of the start")
        if lines_reached(tmp_path / "killed") < nth or state(run_dir) == "FINISHED":
            break
        nth += 1
        wait_until(lambda: state(run_dir) in ("KILLED", "ERROR", "INTERRUPT", "FINISHED"), "KILLED")
        if state(run_dir) == "FINISHED":
            break
        monkeypatch.setenv("LINE_KILL", armed(tmp_path / "killed", role, nth))
        resume(run_dir.path)
    wait_until(lambda: state(run_dir) == "FINISHED", "end of the training")
    wait_until(lambda: not begun_in(tmp_path), "end of all")
    assert nth > 20
    assert_bit_identical(run_dir.path, undisturbed)
    where = {"launcher": "from its first check to the fork of torchrun", "rank": "from the lock to the first status"}
    row(role, f"each line {where[role]}", nth - 1, "*Go on*, killed again, at last FINISHED, to the bit")


def ranks_of(name: str, folder: Path) -> list[int]:
    run = f"--resume {folder / 'runs' / name} "
    other = f"--resume={folder / 'runs' / name} "
    return [pid for pid in alive(folder) if any(text in f"{command_of(pid)} " for text in (run, other))]


# --- at random moments -----------------------------------------------------------------------------------------------


class Server:
    """The page, begun again whenever it was killed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._begin()

    def _begin(self) -> None:
        with (self._folder / "web.log").open("wb") as log:
            self.process = subprocess.Popen(
                [*DIST_TRAIN, "web", "--in", "runs", "--port=0"], stdout=log, stderr=log, start_new_session=True
            )

    def look(self) -> None:
        """Look at the list, as the page does every second."""
        if self.process.poll() is not None:
            self._begin()
        lines = (self._folder / "web.log").read_text().splitlines()
        if lines:
            address, _, token = lines[0].partition("?token=")
            request = urllib.request.Request(f"{address}rows", headers={"Authorization": f"token {token}"})
            with suppress(OSError):
                urllib.request.urlopen(request, timeout=5).read()


ROLES = ("training", "keeper", "server", "launcher")


def test_killed_at_random_moments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Path, row: Callable[..., None],
    count: Callable[..., int],
) -> None:  # fmt: skip
    """The queue always holds a few jobs; somebody looks at the page. At last all killed ones go on."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("LINE_KILL", armed(tmp_path / "killed", "nobody", 0))  # notes each launcher
    draw, kills = random.Random(0), Counter[str]()
    order = list(islice(cycle(ROLES), count(100, 1)))
    draw.shuffle(order)
    jobs: list[RunDir] = []
    server = Server(tmp_path)
    try:
        for role in order:
            victims: list[int] = []
            while not victims:  # the one to be killed may just have been
                moment = time.monotonic() + draw.uniform(0.0, 4.0)
                while time.monotonic() < moment:
                    # One kill needs one job, which may end before it.
                    if not waiting_jobs(tmp_path / "runs") and (len(order) > 1 or not ranks_of_any(tmp_path)):
                        jobs.append(training_job(tmp_path, f"job{len(jobs):03d}"))
                    server.look()
                    assert max(Counter(launched(tmp_path)).values(), default=0) <= 1
                    time.sleep(0.2)
                victims = victims_of(role, server, tmp_path)
            kills[role] += kill(draw.choice(victims))
        while waiting_jobs(tmp_path / "runs"):
            server.look()
            time.sleep(0.2)
        wait_until(lambda: not ranks_of_any(tmp_path), "end of all trainings")
    finally:
        server.process.kill()
        server.process.wait()
    assert kills.total() == len(order)
    assert begin_times(jobs) == sorted(begin_times(jobs))  # each was begun, in order
    assert max(Counter((tmp_path / "killed" / "started").read_text().splitlines()).values()) == 1
    wait_until(lambda: {state(job) for job in jobs} <= {"FINISHED", "KILLED", "ERROR", "INTERRUPT"}, "KILLED")
    unfinished = [job for job in jobs if state(job) != "FINISHED"]
    states = Counter(state(job) for job in unfinished)
    for job in unfinished:  # two at a time
        wait_until(lambda: len({command_of(pid) for pid in ranks_of_any(tmp_path)}) < 6, "room")
        resume(job.path)
    wait_until(lambda: all(state(job) == "FINISHED" for job in jobs), "end of all that went on")
    for job in jobs:
        assert_bit_identical(job.path, undisturbed)
    what = f"{len(jobs)} jobs, each begun once, in order; {dict(states)} went on; all FINISHED, to the bit"
    for role in kills:
        row(role, "random moments", kills[role], what)


def launched(folder: Path) -> list[str]:
    """Return the run of each launcher that is alive."""
    commands = [command_of(pid).split() for pid in alive(folder)]
    return [words[words.index("--resume") + 1] for words in commands if "--resume" in words]


def ranks_of_any(folder: Path) -> list[int]:
    return [pid for pid in alive(folder) if "--resume" in command_of(pid)]


def victims_of(role: str, server: Server, folder: Path) -> list[int]:
    if role == "server":
        return [server.process.pid] if server.process.poll() is None else []
    if role == "keeper":
        return keepers(folder)
    found = ranks_of_any(folder)
    is_launcher: dict[int, bool] = {pid: "--nproc " in command_of(pid) for pid in found}
    if role == "launcher":
        return [pid for pid in found if is_launcher[pid]]
    return [pid for pid in found if not is_launcher[pid] and "torch.distributed.run" not in command_of(pid)]
