"""Bytes that were, or could be, expensive to parse: found by the searches, kept so that every run tries them."""

from __future__ import annotations

__all__ = ["BODIES", "FIELDS", "HEADS", "PATHS", "QUERIES"]

SPACES = b" " * 16_200
HEADS = {
    **{
        f"{name}: spaces and {byte:#04x} {where}": shape % (SPACES + bytes([byte]))
        for byte in (0x00, 0x01, 0x0B, 0x0C, 0x1C, 0x7F, 0x0D)
        for where, name, shape in (
            ("in a value", "value", b"GET / HTTP/1.1\r\nHost: a\r\nA:%bx\r\n\r\n"),
            ("in a name", "name", b"GET / HTTP/1.1\r\nHost: a\r\nA%bx: a\r\n\r\n"),
            ("in the target", "target", b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n"),
            ("in the host", "host", b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n"),
        )
    },
    "words and spaces before NUL": b"GET / HTTP/1.1\r\nHost: a\r\nA: " + b"a  " * 5000 + b"\0\r\n\r\n",
    "tabs and spaces": b"GET / HTTP/1.1\r\nHost: a\r\nA: " + b" \t" * 8000 + b"\r\n\r\n",
    "a long authority and a fragment": b"GET http://" + b"a" * 16_000 + b"# HTTP/1.1\r\nHost: a\r\n\r\n",
    "a long query and a fragment": b"GET http://a/" + b"?" * 16_000 + b"# HTTP/1.1\r\nHost: a\r\n\r\n",
    "a host of colons": b"GET / HTTP/1.1\r\nHost: " + b"a:1" * 5000 + b"\r\n\r\n",
    "a host of escapes": b"GET / HTTP/1.1\r\nHost: " + b"%41" * 5000 + b"%\r\n\r\n",
    "a long length": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: " + b"9" * 16_000 + b"\r\n\r\n",
    "many lengths": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: " + b"5," * 8000 + b"5\r\n\r\n",
    "many short fields": b"GET / HTTP/1.1\r\nHost: a\r\n" + b"a:\r\n" * 4000 + b"\r\n",
    "a hundred long fields": b"GET / HTTP/1.1\r\nHost: a\r\n" + (b"a:" + b" " * 155 + b"\r\n") * 99 + b"\r\n",
    "many connection options": b"GET / HTTP/1.1\r\nHost: a\r\nConnection: " + b"," * 16_000 + b"\r\n\r\n",
    "only line ends": b"\r\n" * 8000,
    "no end": b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 2700,
    "carriage returns": b"GET / HTTP/1.1\r\nHost: a\r\nA: " + b"\r" * 16_000 + b"\r\n\r\n",
}
"""Whole request heads of up to 16 KiB."""

_N = 16_000
FIELDS = {
    "ranges": "bytes=" + "0-0," * (_N // 4),
    "ranges and no end": "bytes=" + "0-," * (_N // 3) + "x",
    "commas": "bytes=" + "," * _N,
    "commas and spaces": "bytes=" + " ," * (_N // 2) + "x",
    "one long number": "bytes=" + "9" * _N + "-",
    "digits without a dash": "bytes=" + "9" * _N,
    "tags": '"a",' * (_N // 4) + '"tag"',
    "tags and no end": '"a",' * (_N // 4) + '"',
    "one long tag": '"' + "a" * _N + '"',
    "one long tag without an end": '"' + "a" * _N,
    "weak prefixes": "W/" * (_N // 2),
    "spaces": " " * _N + "x",
    "a long date": "Sun, 06 Nov 1994 08:49:37 GMT" * (_N // 29),
    "addresses": "127.0.0.1," * (_N // 10),
    "long addresses": "1:" * (_N // 2),
    "brackets": "[" * _N,
    "ports": "1.1.1.1:80," * (_N // 11),
}
"""Values of Range, of the conditional fields and of X-Forwarded-For."""

QUERIES = {
    "names": "&".join(f"a{n}" for n in range(_N // 6)),
    "ampersands": "&" * _N,
    "equals": "=" * _N,
    "escapes": "a=" + "%41" * (_N // 3),
    "broken escapes": "a=" + "%" * _N,
    "plus": "a=" + "+" * _N,
    "no UTF-8": "a=" + "%ff" * (_N // 3),
}

PATHS = {
    "slashes": "/" * _N,
    "escapes": "/" + "%2f" * (_N // 3),
    "escapes in segments": "/%41" * (_N // 4),
    "broken escapes": "/" + "%" * _N,
    "no UTF-8": "/" + "%ff" * (_N // 3),
    "names": "/items/" + "a" * _N,
}

BODIES = {
    "tiny chunks": b"1\r\nx\r\n" * 3000,
    "extensions": b"1" + b";a" * 8000 + b"\r\nx\r\n",
    "spaces in an extension": b"1;a=" + b" " * 16_000 + b"\r\n",
    "spaces before a semicolon": b"1" + b" " * 16_000 + b"\r\n",
    "a long quoted value": b'1;a="' + b"\\a" * 8000 + b'"\r\n',
    "an open quoted value": b'1;a="' + b"\\a" * 8000 + b"\r\n",
    "a long size": b"0" * 16_000 + b"\r\n",
    "trailers": b"0\r\n" + b"a: b\r\n" * 2700,
    "a trailer of spaces before NUL": b"0\r\na:" + b" " * 16_000 + b"\0\r\n",
    "no line end": b"0" * 16_000,
}
"""Chunked bodies, or the beginnings of some."""
