"""How long to wait before the next try: doubled after each failure, up to a limit, with jitter. Pure."""

from __future__ import annotations

import random

__all__ = ["backoff"]


def backoff(failures: int, *, first: float, most: float, jitter: bool = True) -> float:
    """Seconds to wait after so many failures in a row: 0 after none, `first` after one, doubled up to `most`.

    Jitter multiplies by 0.5 to 1.5, so that many clients that met the same outage do not come back together
    (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).
    """
    if failures < 1:
        return 0.0
    pause = min(most, first * 2.0 ** min(failures - 1, 60))
    return pause * random.uniform(0.5, 1.5) if jitter else pause
