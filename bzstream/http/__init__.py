"""HTTP/1.1 on raw sockets: strict parsing, routes, ranges, zero-copy sending. Knows nothing of models or chains.

An application hands the `Server` an object with `admit` (401, 404, 405 from the head) that returns an `Endpoint`: its
`check` refuses before the limits, its `handle` makes a `Response` or a `Representation` after them. `Router` finds
endpoints by path. May import: `payload`, `config`, `errors`, `util`.

Three packages, from bottom to top: `protocol` (pure), `send` (long responses), `io` (server and connections).
"""

from bzstream.http.io.observer import Application, Observer, RequestRecord
from bzstream.http.io.server import Server, raise_descriptor_limit
from bzstream.http.io.tls import Certificate, TlsError
from bzstream.http.protocol.messages import (
    PHRASES,
    Endpoint,
    Fields,
    Headers,
    HttpError,
    Representation,
    Request,
    Response,
    Result,
)
from bzstream.http.protocol.router import Router

__all__ = [
    "PHRASES",
    "Application",
    "Certificate",
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
    "TlsError",
    "raise_descriptor_limit",
]
