"""JSON from outside: what the standard parser lets through in silence is an error here.

RFC 8259 leaves duplicate keys, numbers beyond every float and halves of surrogate pairs to the reader, and Python
reads NaN and Infinity, which are no JSON at all. Two readers of such a text may understand it differently, so it is
refused. Size and depth are bounded before the parser runs; every step is linear in the text. Pure; any thread.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

from bzstream.errors import BzstreamError

__all__ = ["DuplicateKey", "JsonError", "parse_json", "parse_json_object"]

MAX_DEPTH = 64
"""Nested arrays and objects; what bzstream reads has 5 at the most, a checkpoint's config.json some 10."""

_NO_BRACKETS = re.compile(r'(?:[^"\[\]{}]++|"(?:[^"\\]++|\\.)*+"?)++', re.DOTALL)
"""Everything but brackets: strings, whole, and what stands between. The possessive repeats never go back, so that the
search is linear."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class JsonError(BzstreamError):
    """The text is not JSON that bzstream accepts; the message is a clause such as "it holds the key 'a' twice"."""


class DuplicateKey(JsonError):
    """An object holds a key twice."""


def parse_json(
    text: bytes | str,
    *,
    max_bytes: int | None = None,
    max_depth: int = MAX_DEPTH,
    parse_int: Callable[[str], Any] | None = None,
    parse_float: Callable[[str], Any] | None = None,
    python_values: bool = False,
    lone_surrogates: bool = False,
) -> Any:
    """The value in a JSON text. Raises JsonError.

    `parse_int` and `parse_float` make other values of numbers than int and (finite) float. `python_values` also takes
    NaN, Infinity and lone surrogates, which Python's own writer puts into files such as a checkpoint's config.json.
    `lone_surrogates` takes the last of these alone, for a caller that names the field with such a string itself.
    """
    if max_bytes is not None and len(text) > max_bytes:
        raise JsonError(f"it is larger than {max_bytes} bytes")
    try:
        plain = text.decode("utf-8") if isinstance(text, bytes) else text
        _check_depth(plain, max_depth)
        value = json.loads(
            plain,
            object_pairs_hook=_members,
            parse_int=parse_int,
            parse_float=parse_float or (None if python_values else _finite),
            parse_constant=None if python_values else _no_constant,
        )
        if not (python_values or lone_surrogates) and _SURROGATE.search(plain):
            _check_surrogates(value)
    except UnicodeDecodeError:
        raise JsonError("it is not UTF-8 text") from None
    except UnicodeEncodeError:
        raise JsonError("it holds half of a surrogate pair, which is no character") from None
    except (ValueError, RecursionError) as error:  # ValueError: also a number of more than 4,300 digits
        raise JsonError(f"it is not valid JSON: {error}") from None
    return value


def parse_json_object(text: bytes | str, **limits: Any) -> dict[str, Any]:
    """As `parse_json`, for a text that must be an object."""
    value = parse_json(text, **limits)
    if not isinstance(value, dict):
        raise JsonError("it is not a JSON object")
    return value


def _check_depth(text: str, most: int) -> None:
    if text.count("[") + text.count("{") <= most:
        return
    brackets = _NO_BRACKETS.sub("", text)
    for _ in range(most):  # each round takes the innermost pairs away
        if not brackets:
            return
        brackets = brackets.replace("[]", "").replace("{}", "")
    if brackets:
        raise JsonError(f"it is nested more than {most} deep, or its brackets do not match")


def _check_surrogates(value: object) -> None:
    """Raises UnicodeEncodeError when a string in the value cannot be written as UTF-8."""
    json.dumps(value, ensure_ascii=False, default=str).encode("utf-8")


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise DuplicateKey(f"it holds the key {twice!r:.100} twice")
    return members


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text:.40} is beyond every float")
    return value


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")
