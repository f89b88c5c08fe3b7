"""HTTP dates (RFC 9110 5.6.7): written as IMF-fixdate, read in all three forms."""

from __future__ import annotations

import re
from calendar import timegm
from functools import lru_cache
from time import gmtime

__all__ = ["format_date", "parse_date"]

_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_TIME = r"(?P<hour>[0-9]{2}):(?P<minute>[0-9]{2}):(?P<second>[0-9]{2})"
_MONTH = rf"(?P<month>{'|'.join(_MONTHS)})"
# IMF-fixdate  = "Sun, 06 Nov 1994 08:49:37 GMT"
# rfc850-date  = "Sunday, 06-Nov-94 08:49:37 GMT"
# asctime-date = "Sun Nov  6 08:49:37 1994"
_FORMS = (
    re.compile(rf"(?:{'|'.join(_DAYS)}), (?P<day>[0-9]{{2}}) {_MONTH} (?P<year>[0-9]{{4}}) {_TIME} GMT"),
    re.compile(
        r"(?:Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday), "
        rf"(?P<day>[0-9]{{2}})-{_MONTH}-(?P<year>[0-9]{{2}}) {_TIME} GMT"
    ),
    re.compile(rf"(?:{'|'.join(_DAYS)}) {_MONTH} (?P<day>[0-9]{{2}}| [0-9]) {_TIME} (?P<year>[0-9]{{4}})"),
)
_DAYS_IN_MONTH = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


@lru_cache(64)  # most are the current time, or when a snapshot was activated
def format_date(seconds: int) -> str:
    """Epoch seconds as `Sun, 06 Nov 1994 08:49:37 GMT`."""
    t = gmtime(seconds)
    return (
        f"{_DAYS[t.tm_wday]}, {t.tm_mday:02} {_MONTHS[t.tm_mon - 1]} {t.tm_year:04} "
        f"{t.tm_hour:02}:{t.tm_min:02}:{t.tm_sec:02} GMT"
    )


def parse_date(text: str, now: int) -> int | None:
    """Epoch seconds, or None when `text` is no HTTP date.

    `now` (epoch seconds) settles the century of a two-digit year: one that seems more than 50 years ahead is past.
    """
    for form in _FORMS:
        match = form.fullmatch(text)
        if match is None:
            continue
        year, month, day = int(match["year"]), _MONTHS.index(match["month"]) + 1, int(match["day"])
        hour, minute, second = int(match["hour"]), int(match["minute"]), int(match["second"])
        if len(match["year"]) == 2:
            this_year = gmtime(now).tm_year
            year += this_year - this_year % 100
            if year > this_year + 50:
                year -= 100
        # 60 is a leap second; timegm carries it over.
        if not 1 <= day <= _DAYS_IN_MONTH[month - 1] or hour > 23 or minute > 59 or second > 60:
            return None
        return timegm((year, month, day, hour, minute, second))
    return None
