"""The hours in which a worker may work: "22:00-06:00 Europe/Berlin".

Opening and closing are times on the wall clock of a zone, so a night lasts 7 or 9 hours when the
clocks change. A wall-clock time that occurs twice is its first occurrence; one that the change
skips is as far after the last one before it as the text says.
"""

import re
from collections.abc import Iterator
from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo

from nightsplit.shared.errors import ConfigError

_TEXT = re.compile(r"\s*(\d{1,2}):(\d{2})\s*-\s*(\d{1,2}):(\d{2})\s+(\S+)\s*")
_REMEDY = 'write for example shift = "22:00-06:00 Europe/Berlin"; leave the key out to work at all hours.'


class Shift:
    """Working hours that return every day; None for all hours.

    Args:
        text: "HH:MM-HH:MM Zone" with a zone of the IANA database ("Europe/Berlin", "UTC"), or None.

    Raises:
        ConfigError: 106 unreadable text, unknown zone, or a shift that is empty.
    """

    def __init__(self, text: str | None) -> None:
        self.text = text
        self._hours = None if text is None else _parse(text)

    def __str__(self) -> str:
        return self.text or "always"

    def is_open(self, moment: datetime) -> bool:
        """Whether work may be done at `moment` (with a time zone); opening is inside, closing outside."""
        return self._hours is None or self._current(moment) is not None

    def opens_at(self, moment: datetime) -> datetime:
        """`moment` itself if it is open, else the next opening, in UTC."""
        if self.is_open(moment):
            return moment
        return next(opening for opening, _ in self._around(moment) if opening > moment)

    def closes_at(self, moment: datetime) -> datetime | None:
        """The end of the hours around `moment`, in UTC; `moment` itself if closed; None for never."""
        if self._hours is None:
            return None
        return self._current(moment) or moment

    def _current(self, moment: datetime) -> datetime | None:
        """The end of the hours that contain `moment`."""
        return next((closing for opening, closing in self._around(moment) if opening <= moment < closing), None)

    def _around(self, moment: datetime) -> Iterator[tuple[datetime, datetime]]:
        """Hours from the day before `moment` on, in UTC; a clock change may swallow short ones."""
        assert self._hours is not None
        assert moment.tzinfo is not None, "a moment needs a time zone"
        opening, closing, zone = self._hours
        today = moment.astimezone(zone).date()
        for day in (today + timedelta(days) for days in range(-1, 4)):
            last = day if opening < closing else day + timedelta(1)
            begin = datetime.combine(day, opening, zone).astimezone(UTC)
            end = datetime.combine(last, closing, zone).astimezone(UTC)
            if begin < end:
                yield begin, end


def _parse(text: str) -> tuple[time, time, ZoneInfo]:
    match = _TEXT.fullmatch(text)
    if match is None:
        raise ConfigError(106, f"shift {text!r} is not of the form HH:MM-HH:MM Zone.", _REMEDY)
    try:
        opening, closing = time(int(match[1]), int(match[2])), time(int(match[3]), int(match[4]))
    except ValueError:
        raise ConfigError(106, f"shift {text!r}: times go from 00:00 to 23:59.", _REMEDY) from None
    if opening == closing:
        raise ConfigError(106, f"shift {text!r} begins when it ends.", _REMEDY)
    try:
        zone = ZoneInfo(match[5])
    except (OSError, ValueError, LookupError):  # ZoneInfoNotFoundError, a folder's name, a name like "../x"
        raise ConfigError(106, f"shift {text!r}: time zone {match[5]!r} is unknown.", _REMEDY) from None
    return opening, closing, zone
