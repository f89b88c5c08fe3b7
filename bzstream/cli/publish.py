"""`bzstream publish`"""

from __future__ import annotations


def publish() -> None:
    raise NotImplementedError
