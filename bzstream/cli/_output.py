"""Standard streams that a command can rely on: closed, full or unable to show a character, they never end its work."""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO

__all__ = ["flush_results", "prepare_streams"]


class _LastingStream(io.TextIOWrapper):
    """A stream that cannot fail: what cannot be written (a full disk, a reader that is gone) is lost and remembered."""

    failure: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self.failure = error
        return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self.failure = error


def prepare_streams() -> None:
    """Call it first. A closed descriptor becomes /dev/null, so that no file or socket gets its number and its output;
    characters that the encoding lacks are written as escapes.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
            os.set_inheritable(fd, True)
    sys.stdout = _stream(1, sys.stdout, line_buffering=sys.stdout is not None and sys.stdout.isatty())
    sys.stderr = _stream(2, sys.stderr, line_buffering=True)


def _stream(fd: int, before: TextIO | None, *, line_buffering: bool) -> _LastingStream:
    raw = open(fd, "wb", closefd=False)  # noqa: SIM115 - it lives as long as the process
    encoding = before.encoding if before is not None else "utf-8"
    return _LastingStream(raw, encoding=encoding, errors="backslashreplace", line_buffering=line_buffering)


def flush_results(otherwise: str) -> bool:
    """Write out what was printed. False if that failed, now or before, which is said once, after `otherwise`."""
    sys.stdout.flush()
    failure = getattr(sys.stdout, "failure", None)
    if failure is None:
        return True
    print(f"bzstream: {otherwise}: {failure.strerror}", file=sys.stderr)
    sys.stdout = io.StringIO()
    return False
