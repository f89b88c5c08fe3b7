"""HTTP/1.1 on raw sockets: h11 state machine, router, ranges, zero-copy send. Knows nothing of models or chains.

An application hands the `Server` an object with `admit` (401, 404, 405 from the head) that returns an `Endpoint`: its
`check` refuses before the limits, its `handle` makes a `Response` or a `Representation` after them. `Router` finds
endpoints by path. May import: `payload`, `config`,
`errors`.
"""

from bzstream.http.messages import Endpoint, Fields, Headers, HttpError, Representation, Request, Response, Result
from bzstream.http.observer import Application, Observer, RequestRecord, SilentObserver
from bzstream.http.router import Router
from bzstream.http.server import Server, raise_descriptor_limit
from bzstream.http.tls import TlsError

__all__ = [
    "Application",
    "Endpoint",
    "Fields",
    "Headers",
    "HttpError",
    "Observer",
    "Representation",
    "Request",
    "RequestRecord",
    "Response",
    "Result",
    "Router",
    "Server",
    "SilentObserver",
    "TlsError",
    "raise_descriptor_limit",
]
