"""The one HTTP/1.1 client that `client` and `evaluation` share: strict, bounded, blocking, a thread a connection.

`heads` and `chunked` are pure, `connection` is one connection, `connecting` opens it. `proxies` and `socks` are for
`client` only: the evaluator checks every address that it connects to. May import `errors`, `config` and `util`.
"""

from __future__ import annotations

from bzstream.httpclient.connecting import (
    Connector,
    SocketAddress,
    connect_first,
    pinned_tls_context,
    resolve,
    start_tls,
    tls_context,
)
from bzstream.httpclient.connection import Connection, os_reason
from bzstream.httpclient.errors import *  # noqa: F403
from bzstream.httpclient.errors import __all__ as __all__
from bzstream.httpclient.heads import ResponseHead, parse_content_range
from bzstream.httpclient.origin import DEFAULT_PORTS, Origin
from bzstream.httpclient.proxies import ProxyRules

__all__ += (
    "DEFAULT_PORTS", "Connection", "Connector", "Origin", "ProxyRules", "ResponseHead", "SocketAddress",
    "connect_first", "os_reason", "parse_content_range", "pinned_tls_context", "resolve", "start_tls",
    "tls_context",
)  # fmt: skip
