"""Times of a TOC: RFC 3339 text in UTC to and from nanoseconds since the epoch.

Own code because `datetime` keeps microseconds only, and because a layer holds few distinct times and many entries: a
`TimeTable` remembers what it converted.
"""

from __future__ import annotations

import re
from datetime import date

from lazyfs.errors import TocInvalid
from lazyfs.limits import MAX_TIMES

SECOND = 1_000_000_000
EARLIEST = -62_135_596_800 * SECOND  # 0001-01-01T00:00:00Z; RFC 3339 has four digits for the year, and Go begins at 1
LATEST = 253_402_300_800 * SECOND - 1  # the last nanosecond of the year 9999
_EPOCH_DAY = 719_163  # date(1970, 1, 1).toordinal()
_PATTERN = re.compile(r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?(?:Z|([+-])(\d\d):(\d\d))", re.ASCII)


def clamp(mtime_ns: int) -> int:
    """Return the nearest time that a TOC can tell, in nanoseconds. File systems clamp far narrower than that."""
    return min(max(mtime_ns, EARLIEST), LATEST)


def parse_time(text: str) -> int:
    """Return nanoseconds since the epoch, negative before 1970. Raise TocInvalid for anything but RFC 3339."""
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise TocInvalid(f"{text[:60]!r} is not an RFC 3339 time")
    year, month, day, hour, minute, second, fraction, sign, zone_hour, zone_minute = match.groups()
    try:
        days = date(int(year), int(month), int(day)).toordinal() - _EPOCH_DAY
    except ValueError:
        raise TocInvalid(f"{text[:60]!r} is a day that never was") from None
    if int(hour) > 23 or int(minute) > 59 or int(second) > 59:
        raise TocInvalid(f"{text[:60]!r} is a time of day that never is")
    seconds = days * 86400 + int(hour) * 3600 + int(minute) * 60 + int(second)
    if sign:
        if int(zone_hour) > 23 or int(zone_minute) > 59:
            raise TocInvalid(f"{text[:60]!r} is of a time zone that can't be")
        shift = int(zone_hour) * 3600 + int(zone_minute) * 60
        seconds += -shift if sign == "+" else shift
    return seconds * SECOND + (int(fraction.ljust(9, "0")) if fraction else 0)


def format_time(mtime_ns: int) -> str:
    """Return the one way lazyfs writes a time: UTC, a fraction only when there is one, no trailing zeros in it."""
    seconds, fraction = divmod(clamp(mtime_ns), SECOND)
    days, rest = divmod(seconds, 86400)
    text = f"{date.fromordinal(days + _EPOCH_DAY).isoformat()}T{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{text}.{fraction:09}".rstrip("0") + "Z" if fraction else text + "Z"


class TimeTable:
    """Both conversions with a memory of bounded size. Not thread-safe."""

    def __init__(self) -> None:
        self._parsed: dict[str, int] = {}
        self._formatted: dict[int, str] = {}

    def parse(self, text: str) -> int:
        found = self._parsed.get(text)
        if found is None:
            if len(self._parsed) >= MAX_TIMES:
                self._parsed.clear()
            found = self._parsed[text] = parse_time(text)
        return found

    def format(self, mtime_ns: int) -> str:
        found = self._formatted.get(mtime_ns)
        if found is None:
            if len(self._formatted) >= MAX_TIMES:
                self._formatted.clear()
            found = self._formatted[mtime_ns] = format_time(mtime_ns)
        return found
