"""`bzstream evaluate`"""

from __future__ import annotations


def evaluate() -> None:
    raise NotImplementedError
