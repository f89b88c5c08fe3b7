"""`bzstream weights`"""

from __future__ import annotations


def weights() -> None:
    raise NotImplementedError
