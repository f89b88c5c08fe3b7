"""Logs: structlog on standard error, a readable line for a person or a JSON object for a machine.

A log that cannot be written (a full disk, a reader that is gone) is no reason to stop: the line is lost, nothing else.

No token, signature or URL of a miner may ever be logged.
"""

from __future__ import annotations

import logging
import os
from typing import TextIO, cast

import structlog

from bzstream.config import LogSettings

__all__ = ["configure"]

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class _StandardError:
    """Descriptor 2, a line a system call. Without a buffer a line that failed is not tried again with the next one."""

    def write(self, text: str) -> None:
        try:
            os.write(2, text.encode("utf-8", "backslashreplace"))
        except OSError:
            pass

    def flush(self) -> None:
        """Nothing is kept."""


def configure(settings: LogSettings, **context: object) -> None:
    """Set up this process's logs; `context` (role, worker) stands in every line. May be called again to change them."""

    def add_context(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        return {**event, **context}

    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if settings.json
        else structlog.dev.ConsoleRenderer(colors=os.isatty(2), pad_event_to=0)
    )
    structlog.configure(
        processors=[
            add_context,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[settings.level]),
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, _StandardError())),
        cache_logger_on_first_use=False,
    )
