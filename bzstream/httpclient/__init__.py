"""The one HTTP/1.1 client that `client` and `evaluation` share: strict, bounded, blocking, a thread a connection.

`heads` and `chunked` are pure, `connection` is one connection, `connecting` opens it. `proxies` and `socks` are for
`client` only: the evaluator checks every address that it connects to. May import `errors`, `config` and `util`.
"""

from __future__ import annotations

from bzstream.httpclient.connecting import (
    Connector,
    SocketAddress,
    connect_first,
    resolve,
    start_tls,
    tls_context,
)
from bzstream.httpclient.connection import Connection, os_reason
from bzstream.httpclient.errors import (
    BadProxy,
    ClientError,
    ConnectionLost,
    ProtocolViolation,
    Stalled,
    TransientError,
    Unreachable,
)
from bzstream.httpclient.heads import ResponseHead, parse_content_range
from bzstream.httpclient.origin import DEFAULT_PORTS, Origin
from bzstream.httpclient.proxies import ProxyRules

__all__ = [
    "DEFAULT_PORTS",
    "BadProxy",
    "ClientError",
    "Connection",
    "ConnectionLost",
    "Connector",
    "Origin",
    "ProtocolViolation",
    "ProxyRules",
    "ResponseHead",
    "SocketAddress",
    "Stalled",
    "TransientError",
    "Unreachable",
    "connect_first",
    "os_reason",
    "parse_content_range",
    "resolve",
    "start_tls",
    "tls_context",
]
