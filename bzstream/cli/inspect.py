"""`bzstream inspect`"""

from __future__ import annotations


def inspect() -> None:
    raise NotImplementedError
