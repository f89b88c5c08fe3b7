"""The validator's HTTP node: zero-copy distribution of mixture-of-experts shards, submissions and evaluation.

The public API is the client's; it is loaded when it is first used, so that `import bzstream` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bzstream.client import (
        ClientError,
        Progress,
        PullReport,
        UnitReport,
        fetch_tensors,
        fetch_tensors_async,
        pull,
        pull_async,
    )
    from bzstream.errors import BzstreamError

__all__ = [
    "BzstreamError",
    "ClientError",
    "Progress",
    "PullReport",
    "UnitReport",
    "fetch_tensors",
    "fetch_tensors_async",
    "pull",
    "pull_async",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found = getattr(import_module("bzstream.errors" if name == "BzstreamError" else "bzstream.client"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
