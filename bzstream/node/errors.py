"""What a node says when it cannot start."""

from __future__ import annotations

from bzstream.errors import BzstreamError

__all__ = ["NodeError"]


class NodeError(BzstreamError):
    """The node cannot start: a busy port, a missing store."""
