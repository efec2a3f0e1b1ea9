"""Ranks stop together: what one of them was told, all know at the same step."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from dist_train.config.loading import parse_config
from dist_train.distributed.scheduler import Scheduler
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


def on_one_rank_alone(told: int, at: int, phase: Literal["train", "evaluate"], step_s: float, folder: Path) -> None:
    """Tick until the agreed stop; one rank is told at tick `at`. Leaves the tick of the stop in a file."""
    world, request = joined(), StopRequest()
    agreement = Agreement(world, request, interval_s=0.1)
    for tick in range(1, 2000):
        if world.rank == told and tick == at:
            request.request("PREEMPTED" if told else "INTERRUPT")
        time.sleep(step_s * (1 + world.rank))  # of different pace
        agreement.tick(phase)
        if agreement.stop:
            break
    (folder / f"rank_{world.rank}").write_text(f"{tick} {agreement.stop}")
    world.leave()


@pytest.mark.parametrize(("world_size", "told", "phase"), [(2, 0, "train"), (2, 1, "evaluate"), (3, 2, "train")])
def test_all_ranks_stop_at_the_same_tick(world_size: int, told: int, phase: str, tmp_path: Path) -> None:
    run_on_ranks(on_one_rank_alone, told, 150, phase, 0.001, tmp_path, world_size=world_size)
    stops = {path.read_text() for path in tmp_path.glob("rank_*")}
    assert len(stops) == 1
    tick, state = stops.pop().split()
    assert 150 <= int(tick) <= 200  # of the slowest rank 50 at most, of 2 ms, fit into the 0.1 s between agreements
    assert state == ("PREEMPTED" if told else "INTERRUPT")


def saves_by_the_clock(folder: Path) -> None:
    world = joined()
    clock = vars(module)["time"] = Clock()
    agreement = Agreement(world, StopRequest(), save_every_s=0.3, interval_s=0.01)
    if world.rank:
        clock.now += 1000.0  # another clock than rank zero's decides nothing
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


def test_saves_by_the_clock_are_agreed(tmp_path: Path) -> None:
    run_on_ranks(saves_by_the_clock, tmp_path, world_size=2)
    (saves,) = {path.read_text() for path in tmp_path.glob("rank_*")}
    first, second = json.loads(saves)
    assert 59 <= first <= 61
    assert 59 <= second - first <= 61


def slow_rank_sets_the_pace(folder: Path) -> None:
    world, clock, agreed, tick = joined(), Clock(), list[int](), 0
    vars(module)["time"] = clock
    agreement = Agreement(world, StopRequest(), interval_s=1.0, on_agreed=lambda: agreed.append(tick))
    while tick < 30:
        tick += 1
        clock.now += 0.125 if world.rank else 0.001
        agreement.tick()
    agreement.tick("evaluate")  # whose pace is its own
    (folder / f"rank_{world.rank}").write_text(str(agreed))
    world.leave()


def test_the_slowest_rank_sets_the_pace(tmp_path: Path) -> None:
    """Of 0.125 s a step: every 8 steps, once the pace is known."""
    run_on_ranks(slow_rank_sets_the_pace, tmp_path, world_size=2)
    assert {path.read_text() for path in tmp_path.glob("rank_*")} == {"[1, 5, 13, 21, 29, 30]"}


# --- alone ---------------------------------------------------------------------------------------------------------


class Alone:
    """All that an agreement with nobody asks of a world."""

    size, is_rank_zero, device = 1, True, None

    def on_rank_zero(self, action: Callable[[], Any]) -> Any:
        return action()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module, "time", found)
    return found


def agreement_of(request: StopRequest, **kwargs: Any) -> Agreement:
    return Agreement(Alone(), request, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("meant", ["INTERRUPT", "PREEMPTED"])
def test_rank_zero_judges_what_a_term_meant(meant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    request, scheduler = StopRequest(), Scheduler()
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
def test_files_in_the_run_directory_are_wishes(text: str, state: str, tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    agreement = agreement_of(StopRequest(), run_dir=run_dir, interval_s=0.0)
    (tmp_path / "SAVE").touch()
    agreement.tick()
    agreement.tick("evaluate")  # which may come before the loop looks
    assert (agreement.save_due, agreement.stop) == (True, None)
    agreement.saved()
    agreement.tick()
    assert not agreement.save_due
    (tmp_path / "STOP").write_text(text)
    agreement.tick()
    assert agreement.stop == state
    assert list(tmp_path.iterdir()) == []


def test_the_file_of_the_batch_shell_is_left_to_it(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    told = tmp_path / ".stop-7"
    scheduler = Scheduler()
    scheduler.stop_file = told
    agreement = agreement_of(StopRequest(), run_dir=run_dir, scheduler=scheduler, interval_s=0.0)
    agreement.tick()
    assert agreement.stop is None
    told.touch()
    agreement.tick()
    assert agreement.stop == "PREEMPTED"
    assert told.exists()


@pytest.mark.parametrize("step_s", [0.0001, 0.01, 0.3, 3.0])
def test_a_wish_is_noticed_within_about_a_second_or_a_step(step_s: float, clock: Clock) -> None:
    """Whatever the pace, and when it drops by ten meanwhile; and fast steps agree seldom."""
    request = StopRequest()
    agreed = list[float]()
    agreement = agreement_of(request, on_agreed=lambda: agreed.append(clock.now))
    while clock.now < 30 * max(1.0, step_s):
        clock.now += step_s
        agreement.tick()
    assert len(agreed) <= 42  # one a second, or a step, and more at first while the pace is not known
    request.request("INTERRUPT")
    told_at = clock.now
    while agreement.stop is None:
        clock.now += step_s
        agreement.tick()
    assert clock.now - told_at <= max(1.01, step_s * 1.01)


def test_saves_more_frequent_than_agreements_do_not_put_them_off(clock: Clock) -> None:
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


def test_set_up_and_saves_say_nothing_about_the_pace(clock: Clock) -> None:
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
    assert agreed == [1, 1 + 4, 1 + 4 + 16]  # at most four times further than last time


def test_without_an_interval_nothing_is_saved_by_the_clock(clock: Clock) -> None:
    agreement = agreement_of(StopRequest())
    for _ in range(100):
        clock.now += 100.0
        agreement.tick()
        assert not agreement.save_due
