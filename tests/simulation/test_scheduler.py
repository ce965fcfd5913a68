"""Whose turn it is, and what it costs to find out."""

from __future__ import annotations

import math
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from nightsplit.shared.wire.message import SERVER
from nightsplit.simulation import scheduler
from nightsplit.simulation.clock import ManualClock
from nightsplit.simulation.run import Simulation
from nightsplit.simulation.scheduler import REST_ROUNDS_MAX, ROUND_SECONDS, Scheduler, Turn
from nightsplit.site_worker.data.dataset import Dataset, Splits
from tests.harness.night import tiny_config

START = datetime(2026, 3, 1, tzinfo=UTC)


def turns(schedule: Scheduler, number: int, busy: str = "") -> str:
    """Who has the next turns; the busy have something to do."""
    seen = ""
    while len(seen) < number:
        seen += next(schedule)
        schedule.again(seen[-1] in busy)
    return seen


def test_those_with_something_to_do_take_turns_in_their_places() -> None:
    assert turns(Scheduler(ManualClock(START), "abc"), 7, busy="abc") == "abcabca"


def test_a_worker_without_work_rests_for_one_round_two_four() -> None:
    assert turns(Scheduler(ManualClock(START), "ab"), 14, busy="a") == "ababaabaaaabaa"


def test_a_message_ends_a_rest_at_the_place_of_its_receiver() -> None:
    schedule = Scheduler(ManualClock(START), "abc")
    assert turns(schedule, 12, busy="b") == "abcabcbabcbb"
    for worker in "ac":
        schedule.wake(worker)
    assert turns(schedule, 4, busy="b") == "cabc"


def test_the_end_is_when_nobody_has_a_turn_to_come() -> None:
    assert list(Scheduler(ManualClock(START), "abc")) == ["a", "b", "c"]


def test_work_takes_no_time_and_a_round_in_which_all_rest_does() -> None:
    clock = ManualClock(START)
    turns(Scheduler(clock, "ab"), 1000, busy="a")
    assert clock.now() == START
    turns(Scheduler(clock, "ab"), 1000)
    rests = (clock.now() - START).total_seconds() / ROUND_SECONDS
    assert 400 * REST_ROUNDS_MAX < rests < 500 * REST_ROUNDS_MAX


def operations_per_turn(workers: int, monkeypatch: pytest.MonkeyPatch) -> float:
    """Lines that the scheduler runs, and turns that it compares, while a server answers one site after the other."""
    count, turns = 0, 6_000
    compare = Turn.__lt__

    def counted(one: Turn, other: Turn) -> bool:
        nonlocal count
        count += 1
        return compare(one, other)

    def trace(frame, event, argument):
        nonlocal count
        if frame.f_code.co_filename != scheduler.__file__:
            return None
        count += event == "line"
        return trace

    monkeypatch.setattr(Turn, "__lt__", counted)
    sites = [str(number) for number in range(workers)]
    schedule = Scheduler(ManualClock(START), [SERVER, *sites])
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for number in range(turns):
            worker = next(schedule)
            if worker == SERVER:
                schedule.wake(sites[number % workers])
            schedule.again(worker == SERVER)
    finally:
        sys.settrace(before)
    return count / turns


def test_a_turn_costs_the_logarithm_of_the_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (operations_per_turn(workers, monkeypatch) for workers in (10, 1_000))
    assert few < many < few * math.log(1_000) / math.log(10)


# -- a thousand sites ---------------------------------------------------------------------------


class Counted(Simulation):
    """Counts the steps of its workers."""

    steps = 0

    def step(self, worker: str) -> bool:
        self.steps += 1
        return super().step(worker)


def crowd(sites: int, folder: Path) -> Counted:
    """Light sites of one batch each, and nobody to test on."""
    names = tuple(f"site{number}" for number in range(sites))
    config = tiny_config(names, epochs=1, order="fair")
    config = replace(config, data=replace(config.data, validation=0.0, test=0.0))
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    train = Dataset(inputs, (inputs[:, 0] > 0).float(), tuple("12345678"))
    nobody = train.select([])
    return Counted(config, dict.fromkeys(names, Splits(train, nobody, nobody)), folder, prefetch=32)


@pytest.mark.timeout(300)
def test_a_thousand_sites_are_one_run(tmp_path: Path) -> None:
    """And those that wait take few steps."""
    few, many = crowd(30, tmp_path / "few").run(), crowd(1000, tmp_path / "many").run()
    assert set(many.server.applied.values()) == {1}
    assert many.finished == {SERVER, *many.config.run.sites}
    assert many.steps / 1000 < few.steps / 30 * math.log(1000) / math.log(30)
