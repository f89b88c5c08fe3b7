"""The deny list: hotkeys and networks whose requests are refused with 403 `denied`.

`auth.deny_file` holds one entry a line, a hotkey (SS58) or a network (CIDR, or one address); empty lines and lines that
begin with # are skipped. Pure but for the file that it reads; any thread.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path

from bzstream.api.tokens import MAX_FILE, lines_of
from bzstream.chain.keys import is_hotkey
from bzstream.errors import BzstreamError
from bzstream.util.files import read_small_file

__all__ = ["DenyFileError", "DenyList", "read_deny_file"]

_MAPPED = IPv6Network("::ffff:0:0/96")


class DenyFileError(BzstreamError):
    """The deny file cannot be used; the text names the line."""


class DenyList:
    """Who is refused. Immutable; a changed file makes a new one."""

    def __init__(self, entries: Iterable[str] = ()) -> None:
        """Raises ValueError, with the entry's text, for one that is neither a hotkey nor a network."""
        self._hotkeys: set[str] = set()
        self._networks: dict[tuple[int, int], set[int]] = {}
        """(IP version, host bits) -> network numbers: a look-up for each length of prefix, not for each network."""
        for entry in entries:
            if is_hotkey(entry):
                self._hotkeys.add(entry)
                continue
            network = _network(entry)
            bits = network.max_prefixlen - network.prefixlen
            self._networks.setdefault((network.version, bits), set()).add(int(network.network_address) >> bits)

    def has_hotkey(self, *hotkeys: str | None) -> bool:
        """Whether one of them is denied; None is nobody."""
        return not self._hotkeys.isdisjoint(hotkeys)

    def has_address(self, *addresses: str) -> bool:
        """Whether one of the addresses lies in a denied network. IPv4 is written as such, not as `::ffff:…`."""
        if not self._networks:
            return False
        for text in addresses:
            address = ip_address(text)
            number = int(address)
            for (version, bits), networks in self._networks.items():
                if version == address.version and number >> bits in networks:
                    return True
        return False


def read_deny_file(path: Path) -> DenyList:
    """The list in `auth.deny_file`. Raises DenyFileError."""
    try:
        return DenyList(lines_of(read_small_file(path, MAX_FILE).decode("utf-8")))
    except OSError as error:
        raise DenyFileError(f"the deny file {path} cannot be read: {error.strerror}; check auth.deny_file") from None
    except ValueError as error:  # a UnicodeDecodeError is one, too
        raise DenyFileError(
            f"the deny file {path} cannot be used: {error}; write a hotkey or a network a line"
        ) from None


def _network(text: str) -> IPv4Network | IPv6Network:
    network = ip_network(text, strict=False)
    if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED):
        return IPv4Network((IPv4Address(int(network.network_address) & 0xFFFFFFFF), network.prefixlen - 96))
    return network
