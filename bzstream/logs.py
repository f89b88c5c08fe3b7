"""Logs: structlog on stderr, a readable line for a person or a JSON object for a machine.

No token, no signature and no URL of a miner is ever logged; whoever adds a field keeps to that.
"""

from __future__ import annotations

import logging
import sys

import structlog

from bzstream.config import LogSettings

__all__ = ["configure"]

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure(settings: LogSettings, **context: object) -> None:
    """Set up this process's logs; `context` (role, worker) stands in every line. May be called again to change them."""

    def add_context(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        return {**event, **context}

    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if settings.json
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0)
    )
    structlog.configure(
        processors=[
            add_context,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[settings.level]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
