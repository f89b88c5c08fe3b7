"""Announces where this node is (its *axon*) on the chain, so that miners and peers find it by its hotkey.

The chain role calls `consider` at every block, from its event loop. Every `CHECK_BLOCKS` the chain is asked what it
lists for our hotkey. If that is not what the settings say, because it changed, was never announced or was lost (a new
registration), it is announced through the unmodified SDK: `serve_axon`, or `serve_axon_tls` when the node has a
certificate, whose key's pin goes along. The chain keeps IP addresses, not names.
"""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from bzstream.chain.keys import Key
from bzstream.chain.weight_setter import ERA_BLOCKS
from bzstream.config import ChainSettings
from bzstream.errors import BzstreamError
from bzstream.util.key_pin import PIN_ALGORITHM, key_pin

__all__ = ["Announcer", "Axon"]

CHECK_BLOCKS = 20
"""Blocks between two looks at what the chain lists: more than an extrinsic's era, so that two are never under way."""
ATTEMPT_S = 240.0
"""Longest attempt; finality takes about 30 s."""
_PALLET = "SubtensorModule"

_log = structlog.get_logger("bzstream.chain")


class AnnouncementFailed(BzstreamError):
    """The axon is not announced; the sentence says why."""


class Axon(NamedTuple):
    """What the chain lists, or should list, for a hotkey."""

    ip: str
    port: int
    pin: bytes | None
    """The pin of the TLS key (`util.key_pin`); None when no certificate goes along."""


class Announcer:
    """Compares what the chain lists with what it should, and announces the difference."""

    def __init__(self, settings: ChainSettings, key: Key, certificate: str | None) -> None:
        """`certificate`: the node's PEM file, if it speaks TLS itself."""
        assert settings.external_host is not None
        assert settings.external_port is not None
        assert settings.netuid is not None
        self._ip = str(ipaddress.ip_address(settings.external_host))
        self._port = settings.external_port
        self._netuid = settings.netuid
        self._key = key
        self._certificate = certificate
        self._not_before = 0
        self._told: str | None = None
        """The failure that was told last."""
        self._attempt: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether an attempt is under way; a second extrinsic of the same key would take the same nonce."""
        return self._attempt is not None and not self._attempt.done()

    def consider(self, block: int, client: Any) -> None:
        """Called at each new block; `client` is a connected `bittensor.Client`."""
        if self.busy or 0 < self._not_before - block <= CHECK_BLOCKS:
            return
        self._not_before = block + CHECK_BLOCKS
        self._attempt = asyncio.create_task(self._try(client))

    async def close(self) -> None:
        """Give up an attempt under way."""
        if self._attempt is not None:
            self._attempt.cancel()
            await asyncio.gather(self._attempt, return_exceptions=True)

    async def _try(self, client: Any) -> None:
        try:
            async with asyncio.timeout(ATTEMPT_S):
                wanted = Axon(self._ip, self._port, await asyncio.to_thread(self._pin))
                listed = await self._listed(client)
                # A pin cannot be taken back, only replaced: without a certificate the old one is left alone.
                if listed is None or wanted != (listed if wanted.pin else listed._replace(pin=None)):
                    block = await self._announce(client, wanted)
                    _log.info("the axon is announced", ip=wanted.ip, port=wanted.port, block=block)
            self._told = None
        except Exception as error:  # the SDK raises many kinds; every one means: look again at a later block
            reason = str(error) if isinstance(error, BzstreamError) else f"{type(error).__name__}: {error}"[:300]
            if reason != self._told:
                self._told = reason
                _log.error("the axon is not announced", reason=reason, next_try_blocks=CHECK_BLOCKS)

    def _pin(self) -> bytes | None:
        if self._certificate is None:
            return None
        try:
            text = Path(self._certificate).read_text(encoding="ascii")
            # A chain's first certificate is the server's own (RFC 8446 4.4.2).
            first, end, _ = text[text.index(ssl.PEM_HEADER) :].partition(ssl.PEM_FOOTER)
            return key_pin(ssl.PEM_cert_to_DER_cert(first + end))
        except (OSError, ValueError) as error:
            raise AnnouncementFailed(f"http.tls_cert cannot be read: {error}") from None

    async def _listed(self, client: Any) -> Axon | None:
        place = [self._netuid, self._key.ss58_address]
        axon, certificate = await asyncio.gather(
            client.query((_PALLET, "Axons"), place), client.query((_PALLET, "NeuronCertificates"), place)
        )
        if axon is None or not int(axon["ip"]):
            return None
        kind = ipaddress.IPv6Address if int(axon["ip_type"]) == 6 else ipaddress.IPv4Address
        return Axon(str(kind(int(axon["ip"]))), int(axon["port"]), _pin_of(certificate))

    async def _announce(self, client: Any, wanted: Axon) -> int:
        """Send it and wait until it is final; its block."""
        import bittensor

        where = {"netuid": self._netuid, "ip": wanted.ip, "port": wanted.port}
        intent = (
            bittensor.ServeAxon(**where)
            if wanted.pin is None
            else bittensor.ServeAxonTls(**where, certificate="0x" + (bytes([PIN_ALGORITHM]) + wanted.pin).hex())
        )
        result = await client.execute(intent, self._key, period=ERA_BLOCKS)
        if not result.success:
            name = "" if result.error is None or result.error.name is None else f"{result.error.name}: "
            raise AnnouncementFailed(f"the chain does not take it: {name}{result.message}")
        return int(result.extrinsic_id.partition("-")[0])


def _pin_of(certificate: Any) -> bytes | None:
    if certificate is None or int(certificate["algorithm"]) != PIN_ALGORITHM:
        return None
    key = certificate["public_key"]
    return bytes.fromhex(key.removeprefix("0x")) if isinstance(key, str) else bytes(key)
