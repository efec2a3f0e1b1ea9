"""Ranks stop together: a request to one of them takes effect on all at the same step."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from dist_train.config.loading import parse_config
from dist_train.distributed.job_scheduler import JobScheduler
from dist_train.distributed.signals import StopRequest
from dist_train.distributed.world import World
from dist_train.runs.directory import RunDir
from dist_train.training import agreement as module
from dist_train.training.agreement import Agreement
from support.clock import Clock
from support.ranks import join_group, run_on_ranks


def joined() -> World:
    join_group("agreement")
    return World.join(parse_config({"device": "cpu"}))


def request_on_one_rank(
    requested: int, at: int, phase: Literal["train", "evaluate"], step_s: float, folder: Path
) -> None:
    """Tick until the agreed stop; one rank gets the request at tick `at`. Writes the tick of the stop to a file."""
    world, request = joined(), StopRequest()
    agreement = Agreement(world, request, interval_s=0.1)
    for tick in range(1, 2000):
        if world.rank == requested and tick == at:
            request.request("PREEMPTED" if requested else "INTERRUPT")
        time.sleep(step_s * (1 + world.rank))  # ranks of different speed
        agreement.tick(phase)
        if agreement.stop:
            break
    (folder / f"rank_{world.rank}").write_text(f"{tick} {agreement.stop}")
    world.leave()


@pytest.mark.parametrize(("world_size", "requested", "phase"), [(2, 0, "train"), (2, 1, "evaluate"), (3, 2, "train")])
def test_all_ranks_stop_at_same_tick(world_size: int, requested: int, phase: str, tmp_path: Path) -> None:
    run_on_ranks(request_on_one_rank, requested, 150, phase, 0.001, tmp_path, world_size=world_size)
    stops = {path.read_text() for path in tmp_path.glob("rank_*")}
    assert len(stops) == 1
    tick, state = stops.pop().split()
    assert 150 <= int(tick) <= 200  # the slowest rank does at most 50 ticks of 2 ms in the 0.1 s between agreements
    assert state == ("PREEMPTED" if requested else "INTERRUPT")


def saves_on_a_timer(folder: Path) -> None:
    world = joined()
    clock = vars(module)["time"] = Clock()
    agreement = Agreement(world, StopRequest(), save_every_s=0.3, interval_s=0.01)
    if world.rank:
        clock.now += 1000.0  # only rank zero's clock decides
        agreement.start_phase()
    saves = []
    for tick in range(150):
        clock.now += 0.005
        agreement.tick()
        if agreement.save_due:
            saves.append(tick)
            agreement.saved()
            assert not agreement.save_due
    (folder / f"rank_{world.rank}").write_text(str(saves))
    world.leave()


def test_ranks_agree_on_timed_saves(tmp_path: Path) -> None:
    run_on_ranks(saves_on_a_timer, tmp_path, world_size=2)
    (saves,) = {path.read_text() for path in tmp_path.glob("rank_*")}
    first, second = json.loads(saves)
    assert 59 <= first <= 61
    assert 59 <= second - first <= 61


def slow_rank_sets_the_interval(folder: Path) -> None:
    world, clock, agreed, tick = joined(), Clock(), list[int](), 0
    vars(module)["time"] = clock
    agreement = Agreement(world, StopRequest(), interval_s=1.0, on_agreed=lambda: agreed.append(tick))
    while tick < 30:
        tick += 1
        clock.now += 0.125 if world.rank else 0.001
        agreement.tick()
    agreement.tick("evaluate")  # which is timed separately
    (folder / f"rank_{world.rank}").write_text(str(agreed))
    world.leave()


def test_slowest_rank_sets_interval(tmp_path: Path) -> None:
    """At 0.125 s per step the ranks agree every 8 steps, once the speed is known."""
    run_on_ranks(slow_rank_sets_the_interval, tmp_path, world_size=2)
    assert {path.read_text() for path in tmp_path.glob("rank_*")} == {"[1, 5, 13, 21, 29, 30]"}


# --- one rank ------------------------------------------------------------------------------------------------------


class SingleRank:
    """The part of a world that an agreement of one rank uses."""

    size, is_rank_zero, device = 1, True, None

    def on_rank_zero(self, action: Callable[[], Any]) -> Any:
        return action()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def agreement_of(request: StopRequest, **kwargs: Any) -> Agreement:
    return Agreement(SingleRank(), request, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("meant", ["INTERRUPT", "PREEMPTED"])
def test_rank_zero_classifies_sigterm(meant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    request, scheduler = StopRequest(), JobScheduler()
    monkeypatch.setattr(scheduler, "classify_sigterm", lambda: meant)
    agreement = agreement_of(request, scheduler=scheduler, interval_s=0.0)
    agreement.tick()
    assert agreement.stop is None
    request.request("TERM")
    agreement.tick()
    assert agreement.stop == meant


@pytest.mark.parametrize(
    ("text", "state"), [("", "INTERRUPT"), ("please\n", "INTERRUPT"), ("PREEMPTED\n", "PREEMPTED")]
)
def test_files_in_run_directory_are_requests(text: str, state: str, tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    agreement = agreement_of(StopRequest(), run_dir=run_dir, interval_s=0.0)
    (tmp_path / "SAVE").touch()
    agreement.tick()
    agreement.tick("evaluate")  # may run before the loop sees it
    assert (agreement.save_due, agreement.stop) == (True, None)
    agreement.saved()
    agreement.tick()
    assert not agreement.save_due
    (tmp_path / "STOP").write_text(text)
    agreement.tick()
    assert agreement.stop == state
    assert list(tmp_path.iterdir()) == []


def test_stop_file_of_batch_shell_is_not_removed(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    stop_file = tmp_path / ".stop-7"
    scheduler = JobScheduler()
    scheduler.stop_file = stop_file
    agreement = agreement_of(StopRequest(), run_dir=run_dir, scheduler=scheduler, interval_s=0.0)
    agreement.tick()
    assert agreement.stop is None
    stop_file.touch()
    agreement.tick()
    assert agreement.stop == "PREEMPTED"
    assert stop_file.exists()


@pytest.mark.parametrize("step_s", [0.0001, 0.01, 0.3, 3.0])
def test_request_is_noticed_within_about_one_second_or_step(step_s: float, clock: Clock) -> None:
    """This holds for any step time; fast steps agree rarely."""
    request = StopRequest()
    agreed = list[float]()
    agreement = agreement_of(request, on_agreed=lambda: agreed.append(clock.now))
    while clock.now < 30 * max(1.0, step_s):
        clock.now += step_s
        agreement.tick()
    assert len(agreed) <= 42  # one per second or step, and more at first, while the speed is not known
    request.request("INTERRUPT")
    requested_at = clock.now
    while agreement.stop is None:
        clock.now += step_s
        agreement.tick()
    assert clock.now - requested_at <= max(1.01, step_s * 1.01)


def test_saves_more_frequent_than_agreements_do_not_delay_them(clock: Clock) -> None:
    """Epochs of ten fast steps, with a save and an evaluation after each."""
    request = StopRequest()
    agreement = agreement_of(request)
    for step in range(1, 2000):
        clock.now += 0.01
        agreement.tick()
        if step == 1000:
            request.request("INTERRUPT")
        if agreement.stop:
            break
        if step % 10 == 0:
            agreement.start_phase()
            agreement.tick("evaluate")
            agreement.saved()
    assert 1000 < step <= 1000 + 100


def test_setup_and_saves_do_not_count_as_step_time(clock: Clock) -> None:
    agreed, tick = list[int](), 0
    agreement = agreement_of(StopRequest(), on_agreed=lambda: agreed.append(tick))
    clock.now += 500.0
    agreement.start_phase()
    while tick < 30:
        tick += 1
        clock.now += 0.01
        agreement.tick()
        if tick == 1:
            clock.now += 500.0
            agreement.saved()
    assert agreed == [1, 1 + 4, 1 + 4 + 16]  # each interval is at most four times the last one


def test_no_timed_saves_without_interval(clock: Clock) -> None:
    agreement = agreement_of(StopRequest())
    for _ in range(100):
        clock.now += 100.0
        agreement.tick()
        assert not agreement.save_due
