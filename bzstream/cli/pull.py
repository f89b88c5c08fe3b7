"""`bzstream pull`"""

from __future__ import annotations


def pull() -> None:
    raise NotImplementedError
