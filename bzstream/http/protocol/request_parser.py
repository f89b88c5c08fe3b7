"""Parses request heads. Pure functions.

h11 parses and validates a head, and is deliberately lenient where servers of the past were. Leniency in framing is what
request smuggling lives on, so a stricter check comes first. It answers 400 to control bytes, bare LF line ends, folded
lines, Content-Length beside Transfer-Encoding, Transfer-Encoding in HTTP/1.0, and any repeated Content-Length. It also
bounds what h11 is given: one head at a time, never more bytes or fields than the limits say. Everything here takes time
linear in the bytes of the head.

Parsing a head costs 35 µs, and requests repeat byte for byte: health checks, polls, a miner's connections. So short
heads are remembered together with what they mean.

    request-line = method SP request-target SP HTTP-version          HTTP-version = "HTTP/" DIGIT "." DIGIT
    request-target = origin-form / absolute-form / authority-form / asterisk-form
"""

from __future__ import annotations

import re
from functools import lru_cache

import h11
import msgspec

from bzstream.http.protocol.messages import Headers, HttpError, Request
from bzstream.http.protocol.peers import TrustedProxies, caller_of

__all__ = [
    "RequestHead",
    "check_field_line",
    "check_head",
    "find_head",
    "has_forbidden_bytes",
    "make_request",
    "malformed",
    "parse_head",
    "parse_new_head",
    "split_target",
]

_REMEMBERED = 512
_SHORT = 1024
"""Bytes of a head that is remembered: the memory holds at most half a MiB of heads, whatever clients send."""
_TEXT = bytes((0x09, *range(0x20, 0x7F), *range(0x80, 0x100)))
"""What a field value may hold: HTAB, SP, VCHAR and obs-text (RFC 9110 5.5)."""
_TCHAR = frozenset(b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
_REQUEST_LINE = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+ [\x21-\x7e]+ HTTP/([0-9])\.([0-9])")
# Host = uri-host [ ":" port ]; uri-host is an IP-literal, an IPv4address or a reg-name (RFC 3986 3.2.2), may be empty.
_HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.vV]++\]|(?:[A-Za-z0-9\-._~!$&'()*+,;=]|%[0-9A-Fa-f]{2})*+)(?::[0-9]*+)?+")
_DIGITS = re.compile(rb"[0-9]+")
_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++")
# Possessive quantifiers here and above: with `*`, a target of 16 KB with a "#" at its end took seconds.
_ABSOLUTE = re.compile(r"(?i:https?)://([^/?#]*+)([^?#]*+)(?:\?([^#]*+))?+")


class RequestHead(msgspec.Struct, frozen=True):
    """What a request's head says."""

    method: str
    target: str
    """As it stood in the request line."""
    path: str
    query: str
    headers: Headers
    http_version: bytes
    """Such as b"1.1"."""
    persistent: bool
    """Whether the client can go on after the response (RFC 9112 9.3; HTTP/1.0 gets one response)."""
    body_length: int | None
    """Bytes of the body, 0 for none; None for a chunked one."""
    expects_continue: bool
    """Whether the client waits for a 100 before it sends the body (RFC 9110 10.1.1)."""


def malformed(detail: str) -> HttpError:
    """The 400 for a message that does not follow HTTP/1.1."""
    return HttpError(400, "malformed_request", detail)


def find_head(data: bytes, scanned: int) -> int:
    """The position after the blank line that ends the head, or -1 while the head is incomplete.

    `data` starts with the request line; its first `scanned` bytes were seen by an earlier call. Raises HttpError 400 at
    the first bare LF, and at a first byte that cannot start a method (a TLS greeting, for one).
    """
    if data and data[0] not in _TCHAR:
        raise malformed("The request does not start with a method; is this a TLS client on a plain port?")
    feed = data.find(b"\n", scanned)
    while feed >= 0:
        if data[feed - 1] != 0x0D:
            raise malformed("A line ends with a bare LF; lines end with CR LF.")
        if data[feed - 3 : feed] == b"\r\n\r":
            return feed + 1
        feed = data.find(b"\n", feed + 1)
    return -1


def has_forbidden_bytes(lines: bytes) -> bool:
    """Whether lines that end with CR LF hold any byte that is neither text of a field nor such a line end.

    Costs a few microseconds for any 16 KiB. It has to come before every regular expression of h11: that for a field
    value takes quadratic time on white space before NUL, VT or FF.
    """
    controls = lines.translate(None, _TEXT)
    return controls != b"\r\n" * (len(controls) // 2)


def check_field_line(line: bytes) -> None:
    """Refuse a field line (CR LF removed) that is not `name: value` in text. Raises HttpError 400."""
    name, colon, value = line.partition(b":")
    if not colon or _NAME.fullmatch(name) is None or value.translate(None, _TEXT):
        raise malformed("A trailer field is not 'name: value' in one line of text.")


def check_head(head: bytes, max_fields: int) -> None:
    """Refuse a complete head (blank line included) that is not strictly HTTP/1.1.

    Raises HttpError 400, 431 (too many fields) or 505 (major version other than 1).
    """
    if has_forbidden_bytes(head):
        raise malformed("The request head holds control characters.")
    request_line, *lines = head[:-4].split(b"\r\n")
    match = _REQUEST_LINE.fullmatch(request_line)
    if match is None:
        raise malformed("The request line is not 'METHOD target HTTP/1.1'.")
    if match[1] != b"1":
        raise HttpError(505, "http_version_not_supported", "This server speaks HTTP/1.1.")
    if len(lines) > max_fields:
        raise HttpError(431, "head_too_large", f"The request has more than {max_fields} header fields.")
    lengths = codings = 0
    hosts: list[bytes] = []
    for line in lines:
        if line[:1] in (b" ", b"\t"):
            raise malformed("A header field is folded over several lines.")
        name, _, value = line.partition(b":")
        name = name.lower()
        if name == b"content-length":
            lengths += 1
            if not _DIGITS.fullmatch(value.strip(b" \t")):
                raise malformed("Content-Length is not one decimal number.")
        elif name == b"transfer-encoding":
            codings += 1
            if value.strip(b" \t").lower() != b"chunked":
                raise malformed("The only transfer coding that is understood is chunked.")
        elif name == b"host":
            hosts.append(value.strip(b" \t"))
    if lengths > 1 or codings > 1:
        raise malformed("Content-Length or Transfer-Encoding came more than once.")
    if lengths and codings:
        raise malformed("Content-Length and Transfer-Encoding exclude each other.")
    if codings and match[2] == b"0":
        raise malformed("HTTP/1.0 has no Transfer-Encoding.")
    if len(hosts) > 1 or (not hosts and match[2] != b"0"):
        raise malformed("A request has exactly one Host field.")
    if hosts and not _HOST.fullmatch(hosts[0]):
        raise malformed("The Host field is not a host with an optional port.")


def split_target(method: str, target: str) -> tuple[str, str]:
    """(path, query) of a request target, both still percent-encoded (RFC 9112 3.2).

    The authority of the absolute form is not looked at: this server is the origin for whatever name reached it. The
    authority form of CONNECT is given back as a path, which no route has. Raises HttpError 400 for any other form.
    """
    if target.startswith("/"):
        path, _, query = target.partition("?")
        if "#" in target:
            raise malformed("A request target has no fragment.")
        return path, query
    if (match := _ABSOLUTE.fullmatch(target)) is not None:
        return match[2] or ("*" if method == "OPTIONS" and match[3] is None else "/"), match[3] or ""
    if target == "*" and method == "OPTIONS":
        return "*", ""
    if method == "CONNECT":
        return target, ""
    raise malformed("The request target is neither a path nor an http URL.")


def parse_head(head: bytes, max_fields: int) -> RequestHead:
    """Parse a complete head, blank line included.

    Raises HttpError 400, 431 (too many fields) or 505 (major version other than 1).
    """
    return _remembered(head, max_fields) if len(head) <= _SHORT else parse_new_head(head, max_fields)


def parse_new_head(head: bytes, max_fields: int) -> RequestHead:
    """As `parse_head`, of a head that is not remembered."""
    check_head(head, max_fields)
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=len(head) + 1)
    parser.receive_data(head)
    try:
        event = parser.next_event()
    except h11.RemoteProtocolError:
        raise malformed("The request head does not follow HTTP/1.1.") from None
    assert isinstance(event, h11.Request)
    method, target = event.method.decode("ascii"), event.target.decode("ascii")
    headers = Headers([(name.decode("ascii"), value.decode("latin-1")) for name, value in event.headers])
    path, query = split_target(method, target)
    options = (headers.list("connection") or "").lower().split(",")
    persistent = event.http_version >= b"1.1" and "close" not in (option.strip() for option in options)
    # Nineteen digits are more than any limit, and int() of long text is slow.
    digits = (headers.get("content-length") or "").lstrip("0")[:19]
    length = None if "transfer-encoding" in headers else int(digits or "0")
    expects = event.http_version != b"1.0" and (headers.list("expect") or "").lower() == "100-continue"
    return RequestHead(method, target, path, query, headers, event.http_version, persistent, length, expects)


_remembered = lru_cache(_REMEMBERED)(parse_new_head)


def make_request(head: RequestHead, address: str, secure: bool, proxies: TrustedProxies) -> Request:
    """The application's request. `address` and `secure` (TLS) are those of the connection itself."""
    peer = address
    if peer in proxies:
        secure = secure or (head.headers.list("x-forwarded-proto") or "").lower() == "https"
        peer = proxies.resolve(peer, head.headers)
    caller = caller_of(peer)
    return Request(head.method, head.target, head.path, head.query, head.headers, peer, caller, address, secure)
