"""The base class of every error that a person may read.

Each package derives its own few classes from `BzstreamError`. The text is one clear sentence that says what is wrong
and what to do about it. The command line prints it and exits with status 1; the api turns it into a response.
Anything that is not a `BzstreamError` is a bug and may show a traceback in a log, never in a response.
"""

from __future__ import annotations

__all__ = ["BzstreamError"]


class BzstreamError(Exception):
    """Something went wrong for a reason that a person can act on; `str(error)` is the sentence to show."""
