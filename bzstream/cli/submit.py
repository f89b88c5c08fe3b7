"""`bzstream submit`"""

from __future__ import annotations


def submit() -> None:
    raise NotImplementedError
