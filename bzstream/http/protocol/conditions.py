"""Conditional requests (RFC 9110 13) for a representation with a strong entity tag and a modification time.

    entity-tag = [ "W/" ] DQUOTE *etagc DQUOTE          etagc = %x21 / %x23-7E / obs-text
    If-Match, If-None-Match = "*" / #entity-tag

The order of evaluation is that of 13.2.2: If-Match, else If-Unmodified-Since; If-None-Match, else If-Modified-Since;
then Range with If-Range. A date that cannot be read is as good as absent, as is one given twice.
"""

from __future__ import annotations

import re
from typing import Literal

from bzstream.http.protocol.dates import parse_date
from bzstream.http.protocol.messages import Headers

__all__ = ["evaluate", "range_applies"]

_TAG = r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"'
_TAGS = re.compile(rf"(?:{_TAG})?+(?:[ \t]*+,[ \t]*+(?:{_TAG})?+)*+")
_ONE_TAG = re.compile(_TAG)


def evaluate(headers: Headers, etag: str, last_modified: int, now: int) -> Literal[304, 412] | None:
    """The status that the request's conditions call for instead of the representation, or None to go on.

    `etag` is strong and quoted; `last_modified` and `now` are epoch seconds.
    """
    if (field := headers.list("if-match")) is not None:
        # Strong comparison: a weak tag never matches.
        if field != "*" and etag not in _tags(field):
            return 412
    elif (date := _date(headers, "if-unmodified-since", now)) is not None and last_modified > date:
        return 412
    if (field := headers.list("if-none-match")) is not None:
        # Weak comparison: the prefix does not count.
        if field == "*" or etag in [tag.removeprefix("W/") for tag in _tags(field)]:
            return 304
    elif (date := _date(headers, "if-modified-since", now)) is not None and last_modified <= date:
        return 304
    return None


def range_applies(headers: Headers, etag: str, last_modified: int, now: int) -> bool:
    """Whether If-Range, if there is one, lets the Range field count (RFC 9110 13.1.5)."""
    values = headers.all("if-range")
    if not values:
        return True
    if len(values) > 1:
        return False
    if _ONE_TAG.fullmatch(values[0]):
        return values[0] == etag
    # A date is a strong validator only if the representation cannot have changed again within its second (8.8.2.2).
    return parse_date(values[0], now) == last_modified and last_modified < now


def _tags(field: str) -> list[str]:
    """The tags of a list; none when the list is malformed, so that it matches nothing."""
    return _ONE_TAG.findall(field) if _TAGS.fullmatch(field) else []


def _date(headers: Headers, name: str, now: int) -> int | None:
    values = headers.all(name)
    return parse_date(values[0], now) if len(values) == 1 else None
