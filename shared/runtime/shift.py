"""Shift: the hours in which a worker may work, e.g. "22:00-06:00 Europe/Berlin".

Opening and closing are times on the wall clock of a zone, so that a night lasts 7 or 9 hours when
the clocks change. A time that occurs twice means its first occurrence; a time that the change skips
is read with the offset before the change, so that 02:30 becomes 03:30.
"""

import re
from collections.abc import Iterator
from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo

from typing_extensions import override

from nightsplit.shared.errors import ConfigError

_TEXT = re.compile(r"\s*(\d{1,2}):(\d{2})\s*-\s*(\d{1,2}):(\d{2})\s+(\S+)\s*")
_REMEDY = 'write for example shift = "22:00-06:00 Europe/Berlin"; remove the key to work at all hours.'


class Shift:
    """Daily working hours, or all hours.

    Args:
        text: "HH:MM-HH:MM Zone" with a zone of the IANA database ("Europe/Berlin", "UTC"); None for all hours.

    Raises:
        ConfigError: 106 invalid text, unknown zone, or an empty shift.
    """

    def __init__(self, text: str | None) -> None:
        self.text = text
        self._hours = None if text is None else _parse(text)

    @override
    def __str__(self) -> str:
        return self.text or "always"

    def is_open(self, moment: datetime) -> bool:
        """Return whether the shift includes `moment` (with a time zone), from opening to before closing."""
        return self._hours is None or self._current(moment) is not None

    def opens_at(self, moment: datetime) -> datetime:
        """Return `moment` itself if the shift includes it, else the next opening, in UTC."""
        if self.is_open(moment):
            return moment
        return next(opening for opening, _ in self._around(moment) if opening > moment)

    def closes_at(self, moment: datetime) -> datetime | None:
        """Return the end of the hours around `moment`, in UTC; `moment` itself if closed; None for never."""
        if self._hours is None:
            return None
        return self._current(moment) or moment

    def _current(self, moment: datetime) -> datetime | None:
        """Return the end of the hours that contain `moment`, if any do."""
        return next((closing for opening, closing in self._around(moment) if opening <= moment < closing), None)

    def _around(self, moment: datetime) -> Iterator[tuple[datetime, datetime]]:
        """Yield the hours from the day before `moment` on, in UTC; a clock change may remove short ones."""
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
