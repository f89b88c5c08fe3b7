"""Canonical JSON: the one byte string that a set of signed fields has.

A signature is made over bytes, but the two sides exchange fields. RFC 8785 (JSON Canonicalization Scheme) gives every
JSON value exactly one encoding: members sorted by the UTF-16 code units of their names, no white space, the shortest
escapes, UTF-8. Everything that bzstream signs is made of strings, integers, booleans, null, lists and objects, so that
numbers with a fraction, the one hard part of the RFC, are refused rather than written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from bzstream.errors import BzstreamError

__all__ = ["MAX_INTEGER", "NotCanonical", "canonical_json"]

MAX_INTEGER = 2**53 - 1
"""Largest integer that every JSON reader holds exactly (RFC 8785 3.2.2.3 and RFC 7493 2.2: an IEEE 754 double)."""


class NotCanonical(BzstreamError):
    """A value has no canonical form here: a float, a lone surrogate, an integer beyond 2^53 - 1, another type."""


def canonical_json(value: object) -> bytes:
    """The RFC 8785 encoding of a value made of str, int, bool, None, list (or tuple) and mappings with str keys.

    Raises NotCanonical for anything else, for integers beyond +-(2^53 - 1) and for strings with lone surrogates.
    """
    # The encoder writes what RFC 8785 3.2.2.2 asks for: \b \t \n \f \r \" \\, \u00xx in lower case for the other
    # control characters, and everything else as it is. Only the order of members needs help: `sort_keys` sorts by
    # code points, the RFC by UTF-16 code units, and they differ above U+FFFF.
    try:
        return _ENCODER.encode(_ordered(value)).encode("utf-8")
    except UnicodeEncodeError:
        raise NotCanonical("a string with a lone surrogate has no UTF-8 form; send valid Unicode") from None


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _ordered(value: object) -> object:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        if abs(value) > MAX_INTEGER:
            raise NotCanonical(f"integers beyond {MAX_INTEGER} are not exact in JSON; write it as a string")
        return int(value)
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise NotCanonical(f"names of JSON members are strings, not {type(name).__name__}")
        return {name: _ordered(value[name]) for name in sorted(value, key=_utf16)}
    if isinstance(value, list | tuple):
        return [_ordered(item) for item in value]
    raise NotCanonical(f"a {type(value).__name__} has no canonical form; use strings and integers")


def _utf16(name: str) -> bytes:
    # surrogatepass: a lone surrogate must sort somewhere; the encoding to UTF-8 refuses it afterwards.
    return name.encode("utf-16-be", "surrogatepass")
