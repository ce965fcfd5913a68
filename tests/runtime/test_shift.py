from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from nightsplit.shared.errors import ConfigError
from nightsplit.shared.runtime.shift import Shift

BERLIN = ZoneInfo("Europe/Berlin")


def berlin(*when: int) -> datetime:
    return datetime(*when, tzinfo=BERLIN)  # type: ignore[misc, arg-type]


NIGHT = Shift("22:00-06:00 Europe/Berlin")
DAY = Shift("08:00-17:30 UTC")


@pytest.mark.parametrize(
    ("moment", "is_open"),
    [
        (berlin(2024, 5, 1, 21, 59, 59), False),
        (berlin(2024, 5, 1, 22), True),
        (berlin(2024, 5, 2, 0), True),
        (berlin(2024, 5, 2, 5, 59, 59), True),
        (berlin(2024, 5, 2, 6), False),
        (datetime(2024, 5, 1, 20, tzinfo=UTC), True),
        (datetime(2024, 5, 1, 19, 59, tzinfo=UTC), False),
    ],
)
def test_night_is_open_on_the_wall_clock(moment: datetime, is_open: bool) -> None:
    assert NIGHT.is_open(moment) is is_open


def test_opens_now_or_next() -> None:
    inside, outside = berlin(2024, 5, 1, 23), berlin(2024, 5, 1, 12)
    assert NIGHT.opens_at(inside) == inside
    assert NIGHT.opens_at(outside) == berlin(2024, 5, 1, 22)
    assert DAY.opens_at(datetime(2024, 5, 1, 17, 30, tzinfo=UTC)) == datetime(2024, 5, 2, 8, tzinfo=UTC)


def test_closes_at_the_end_of_the_present_hours() -> None:
    outside = berlin(2024, 5, 1, 12)
    assert NIGHT.closes_at(berlin(2024, 5, 1, 23)) == berlin(2024, 5, 2, 6)
    assert NIGHT.closes_at(berlin(2024, 5, 2, 5)) == berlin(2024, 5, 2, 6)
    assert NIGHT.closes_at(outside) == outside
    assert DAY.closes_at(datetime(2024, 5, 1, 9, tzinfo=UTC)) == datetime(2024, 5, 1, 17, 30, tzinfo=UTC)


@pytest.mark.parametrize(("day", "hours"), [((2024, 3, 30), 7), ((2024, 10, 26), 9), ((2024, 5, 1), 8)])
def test_nights_of_the_clock_change(day: tuple[int, int, int], hours: int) -> None:
    opening = NIGHT.opens_at(berlin(*day, 12))
    closing = NIGHT.closes_at(opening)
    assert closing is not None
    assert closing - opening == timedelta(hours=hours)
    minutes = [opening + timedelta(minutes=m) for m in range(-60, 11 * 60)]
    assert sum(NIGHT.is_open(minute) for minute in minutes) == hours * 60


def test_hours_that_a_clock_change_swallows() -> None:
    early = Shift("02:00-03:00 Europe/Berlin")
    assert early.opens_at(berlin(2024, 3, 30, 12)) == berlin(2024, 4, 1, 2)


def test_answers_are_consistent_over_a_year() -> None:
    moment = datetime(2024, 1, 1, tzinfo=UTC)
    while moment.year == 2024:
        opening, closing = NIGHT.opens_at(moment), NIGHT.closes_at(moment)
        assert closing is not None
        assert opening >= moment
        assert NIGHT.is_open(opening)
        assert (opening == moment) == NIGHT.is_open(moment) == (closing > moment)
        assert not NIGHT.is_open(closing)
        moment += timedelta(minutes=157)


def test_always() -> None:
    moment = datetime(2024, 1, 1, tzinfo=UTC)
    always = Shift(None)
    assert always.is_open(moment)
    assert always.opens_at(moment) == moment
    assert always.closes_at(moment) is None
    assert (str(always), str(DAY)) == ("always", "08:00-17:30 UTC")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("06:00-06:00 UTC", "begins when it ends"),
        ("nights", "not of the form"),
        ("", "not of the form"),
        ("22:00-06:00", "not of the form"),
        ("22-06 UTC", "not of the form"),
        ("22:00-24:00 UTC", "23:59"),
        ("22:00-05:60 UTC", "23:59"),
        ("22:00-06:00 Europe/Atlantis", "Europe/Atlantis"),
        ("22:00-06:00 Europe", "unknown"),
        ("22:00-06:00 ../etc", "unknown"),
    ],
)
def test_unusable_shift(text: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part) as caught:
        Shift(text)
    assert caught.value.number == 106
    assert "22:00-06:00 Europe/Berlin" in caught.value.remedy
