"""From what came in to the application's `Request`. Pure functions."""

from __future__ import annotations

from bzstream.http.heads import RequestHead
from bzstream.http.messages import HttpError, Request
from bzstream.http.peers import TrustedProxies, caller_of
from bzstream.http.request_body import too_large

__all__ = ["check_body_head", "translate"]


def translate(head: RequestHead, address: str, secure: bool, loopback: bool, proxies: TrustedProxies) -> Request:
    """A head as the application's request. `address`, `secure`, `loopback`: of the connection itself."""
    peer = address
    if peer in proxies:
        secure = secure or (head.headers.list("x-forwarded-proto") or "").lower() == "https"
        peer = proxies.resolve(peer, head.headers)
    return Request(
        head.method, head.target, head.path, head.query, head.headers, peer, caller_of(peer), loopback, secure
    )


def check_body_head(head: RequestHead, limit: int) -> None:
    """What can be said of a body before a byte of it has come: raises HttpError 413 (too long) or 417."""
    if head.body_length is not None and head.body_length > limit:
        raise too_large(limit)
    # RFC 9110 10.1.1: an expectation in an HTTP/1.0 request is ignored.
    if "expect" in head.headers and not head.expects_continue and head.http_version != b"1.0":
        raise HttpError(417, "expectation_failed", "The only expectation that can be met is 100-continue.")
