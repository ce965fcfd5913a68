"""The deadline of a round, on an injected clock."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from nightsplit.server_worker.rounds.deadline import Deadline
from nightsplit.shared.run_store.status import Round


class Clock:
    """Starts on an evening."""

    def __init__(self) -> None:
        self.moment = datetime(2026, 3, 1, 20, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.moment

    def pass_hours(self, hours: float) -> None:
        self.moment += timedelta(hours=hours)


def test_it_is_over_when_the_round_has_been_open_for_so_long() -> None:
    clock = Clock()
    deadline = Deadline(2.0, Round(), clock)
    clock.pass_hours(1.9)
    assert not deadline.is_over
    clock.pass_hours(0.1)
    assert deadline.is_over


def test_the_next_round_has_all_its_time() -> None:
    clock = Clock()
    deadline = Deadline(2.0, Round(), clock)
    clock.pass_hours(1.5)
    deadline.update(0)
    clock.pass_hours(0.25)
    deadline.update(1)
    clock.pass_hours(1.75)
    assert not deadline.is_over
    deadline.update(1)
    clock.pass_hours(0.25)
    assert deadline.is_over


def test_it_goes_on_while_no_server_is_there() -> None:
    """Also over a night: sites have had these hours."""
    clock = Clock()
    first = Deadline(12.0, Round(), clock)
    first.update(3)
    clock.pass_hours(4)
    second = Deadline(12.0, first.round, clock)
    second.update(3)
    clock.pass_hours(7.5)
    assert not second.is_over
    clock.pass_hours(0.5)
    assert second.is_over


def test_a_server_that_finds_another_round_than_it_was_told_of_begins_anew() -> None:
    clock = Clock()
    first = Deadline(1.0, Round(), clock)
    clock.pass_hours(5)
    second = Deadline(1.0, first.round, clock)
    second.update(1)
    assert not second.is_over
