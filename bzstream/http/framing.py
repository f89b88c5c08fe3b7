"""The gate before h11: finds a request's head in the bytes received, and refuses what h11 would let pass.

h11 parses and validates, and is deliberately lenient where servers of the past were. Leniency in framing is what
request smuggling lives on, so this gate answers 400 to bare LF line ends, folded lines, Content-Length beside
Transfer-Encoding, Transfer-Encoding in HTTP/1.0, and any repeated Content-Length. It also bounds what h11 is handed:
one head at a time, never more bytes or fields than the limits say.

    request-line = method SP request-target SP HTTP-version          HTTP-version = "HTTP/" DIGIT "." DIGIT
    request-target = origin-form / absolute-form / authority-form / asterisk-form
"""

from __future__ import annotations

import re

from bzstream.http.messages import HttpError

__all__ = ["check_field_line", "check_head", "find_head", "has_forbidden_bytes", "malformed", "split_target"]

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


def malformed(detail: str) -> HttpError:
    """The 400 for a message that does not follow HTTP/1.1."""
    return HttpError(400, "malformed_request", detail)


def find_head(data: bytes, scanned: int) -> int:
    """The position after the blank line that ends the head, or -1 while it is incomplete.

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
