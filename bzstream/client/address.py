"""Where a validator is and what a pull asks it for, as plain values: URLs, paths, headers and file names.

Pure functions. A base URL may carry a path (a node behind a reverse proxy); it must not carry a query, a fragment or
credentials: the token travels in a header, and URLs end up in logs. The one fragment that it may have is the pin of the
server's TLS key (`#pin-sha256=<64 hex>`, `util.key_pin`), by which the server is known instead of by its name.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple
from urllib.parse import quote, urlsplit

from bzstream.client.errors import BadUrl
from bzstream.httpclient import DEFAULT_PORTS, Origin

__all__ = ["VERSION_FORM", "Address", "UnitRef", "parse_address"]

VERSION_FORM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
"""A model version, as the HTTP contract spells it."""

_PIN_FORM = re.compile(r"pin-sha256=([0-9a-f]{64})", re.ASCII)
_HOST_FORM = re.compile(r"[A-Za-z0-9.:_%-]+", re.ASCII)
_PREFIX_FORM = re.compile(r"(?:/[A-Za-z0-9._~!$&'()*+,;=:@%-]+)*", re.ASCII)  # RFC 3986 3.3: segments of pchar


class Address(NamedTuple):
    """One validator: where it is, and a `prefix` before its paths, "" or a path without a trailing slash."""

    origin: Origin
    prefix: str
    pin: bytes | None = None
    """The pin of its TLS key; None: its certificate must hold its name."""

    def __str__(self) -> str:
        return f"{self.origin}{self.prefix}"


def parse_address(url: str) -> Address:
    """The address in `url`, such as `http://10.0.0.7:8000` or `https://validator.example/node`. Raises BadUrl."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise BadUrl(f"{url!r} is not a URL: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadUrl(f"{url!r} is not the URL of a validator; write it like http://10.0.0.7:8000")
    if parts.username is not None or parts.password is not None:
        raise BadUrl("a URL of a validator holds no user or password; the token comes from BZ_AUTH_TOKEN")
    pin = _PIN_FORM.fullmatch(parts.fragment) if parts.scheme == "https" else None
    if parts.query or (parts.fragment and pin is None):
        raise BadUrl(f"{url!r} has a query or a fragment; give only where the validator is")
    prefix = parts.path.rstrip("/")
    if not _PREFIX_FORM.fullmatch(prefix) or not _HOST_FORM.fullmatch(parts.hostname):
        raise BadUrl(f"{url!r} has characters that no URL may have; write it like http://10.0.0.7:8000")
    scheme: Literal["http", "https"] = "https" if parts.scheme == "https" else "http"
    origin = Origin(scheme, parts.hostname, DEFAULT_PORTS[scheme] if port is None else port)
    return Address(origin, prefix, None if pin is None else bytes.fromhex(pin[1]))


class UnitRef(NamedTuple):
    """One downloadable unit: a group's slice (`partial`), the `shared` tensors, the `ungrouped` experts (those of no
    group) or the `full` model."""

    kind: Literal["partial", "shared", "ungrouped", "full"]
    group: int | None = None

    @property
    def file_name(self) -> str:
        """Name of the finished file."""
        names = {"partial": f"group-{self.group}", "full": "model"}
        return names.get(self.kind, self.kind) + ".safetensors"

    @property
    def label(self) -> str:
        """For a person."""
        return {"partial": f"group {self.group}", "full": "full model"}.get(self.kind, self.kind)

    @property
    def headers(self) -> list[tuple[str, str]]:
        return [("X-Expert-Group", str(self.group))] if self.kind == "partial" else []

    def target(self, version: str | None = None, *, manifest: bool = False, coding: str = "") -> str:
        """Path and query, as the node sees them, of the unit's bare safetensors bytes, of its manifest, or of a coded
        form, of which `coding` is the query that names it."""
        path = f"/model/{self.kind}"
        query = []
        if manifest:
            path += "/manifest"
        elif coding:
            path += "/coded"
            query.append(coding)
        elif self.kind != "full":
            query.append("format=safetensors")
        if version is not None:
            query.append(f"version={quote(version, safe='')}")
        return path + ("?" + "&".join(query) if query else "")
