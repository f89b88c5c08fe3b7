"""The proxies that the environment names, chosen as curl chooses them. Pure but for reading the variables.

`http_proxy` (lower case only: a CGI program's HTTP_PROXY is a request's header), `https_proxy`, `all_proxy`, `no_proxy`
and the last three in capitals, lower case first. `no_proxy`: names and addresses separated by commas or spaces; a name
stands for its subdomains too, an address may be a network (CIDR), `*` is everything. Documented in curl(1) under
ENVIRONMENT and `--noproxy`.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from typing import Literal, NamedTuple
from urllib.parse import unquote, urlsplit

from bzstream.httpclient.errors import BadProxy
from bzstream.httpclient.origin import Origin, authority

__all__ = ["Proxy", "ProxyRules"]

_DEFAULT_PORT = 1080
"""curl's, for every scheme of a proxy but https."""
_HOST = re.compile(r"[A-Za-z0-9.:_%-]+", re.ASCII)


class Proxy(NamedTuple):
    """`socks5` resolves the name here, `socks5h` there. `user` and `password` are "" without any."""

    kind: Literal["http", "socks5", "socks5h"]
    host: str
    port: int
    user: str = ""
    password: str = ""

    @property
    def fields(self) -> list[tuple[str, str]]:
        """What requests to an http proxy carry (RFC 7617)."""
        if not self.user and not self.password:
            return []
        credentials = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        return [("Proxy-Authorization", f"Basic {credentials}")]

    def __str__(self) -> str:
        return f"{self.kind}://{authority(self.host, self.port)}"


class ProxyRules:
    """Which proxy leads where. `environment`: `os.environ`, or {} for none."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        def value(name: str) -> str:
            return environment.get(name) or environment.get(name.upper()) or ""

        self._urls = {
            "http": environment.get("http_proxy") or value("all_proxy"),
            "https": value("https_proxy") or value("all_proxy"),
        }
        self._exempt = value("no_proxy").replace(",", " ").split()

    def for_origin(self, origin: Origin) -> Proxy | None:
        """The proxy for requests to this origin, None to go there directly. Raises BadProxy."""
        url = self._urls[origin.scheme]
        if not url or any(_covers(entry, origin.host) for entry in self._exempt):
            return None
        return _parse(url)


def _parse(url: str) -> Proxy:
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port or _DEFAULT_PORT
    except ValueError:
        raise BadProxy("a proxy variable of the environment is not a URL; write it like http://proxy:3128") from None
    kinds: dict[str, Literal["http", "socks5", "socks5h"]] = {"http": "http", "socks5": "socks5", "socks5h": "socks5h"}
    kind = kinds.get(parts.scheme)
    if kind is None:
        raise BadProxy(f"proxies of the kind {parts.scheme!r:.20} are not supported; use http, socks5 or socks5h")
    host = parts.hostname or ""
    if not _HOST.fullmatch(host):
        raise BadProxy("a proxy variable of the environment names no host; write it like http://proxy:3128")
    return Proxy(kind, host, port, unquote(parts.username or ""), unquote(parts.password or ""))


def _covers(entry: str, host: str) -> bool:
    """Whether an entry of no_proxy stands for this host."""
    if entry == "*":
        return True
    import ipaddress  # 3 ms that a client without proxies need not pay

    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry.strip("[]"), strict=False)
    except ValueError:  # one of the two is a name
        name = entry.strip(".").lower()
        return bool(name) and f".{host.strip('.').lower()}".endswith(f".{name}")
