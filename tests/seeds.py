"""How far the long searches of the tests go: a few seeds in every run, all of them with `scripts/test --long`.

A test that tries random inputs, kills a process again and again or races against itself asks `seeds` how often.
"""

from __future__ import annotations

import os

__all__ = ["LONG", "seeds"]

LONG = os.environ.get("BZ_TEST_LONG") == "1"
"""`scripts/test --long` sets it."""


def seeds(few: int, many: int) -> int:
    """How many seeds, examples, kills or rounds a search takes: `few`, or `many` in a long run."""
    return many if LONG else few
