"""An origin: scheme, host and port, as a plain value (RFC 9110 4.3.1)."""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ["DEFAULT_PORTS", "Origin", "authority"]

DEFAULT_PORTS = {"http": 80, "https": 443}


def authority(host: str, port: int, default: int | None = None) -> str:
    """`host:port` with brackets around an IPv6 address (RFC 3986 3.2); the default port is left out."""
    name = f"[{host}]" if ":" in host else host
    return name if port == default else f"{name}:{port}"


class Origin(NamedTuple):
    """`host` is a name or an address without brackets."""

    scheme: Literal["http", "https"]
    host: str
    port: int

    @property
    def secure(self) -> bool:
        return self.scheme == "https"

    @property
    def authority(self) -> str:
        """The Host field's value (RFC 9110 7.2)."""
        return authority(self.host, self.port, DEFAULT_PORTS[self.scheme])

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}"
