"""A Bittensor node on loopback, as far as the SDK can tell: JSON-RPC over a WebSocket with the real runtime's metadata.

It answers what the SDK asks for connecting, heads, finality, block hashes and the metagraph, and misbehaves on demand.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import lzma
from pathlib import Path
from typing import Any

from bittensor._transport.codec import RuntimeCodec, strip_option_opaque_metadata
from websockets.asyncio.server import Server, ServerConnection, serve

METADATA = lzma.decompress((Path(__file__).parent / "data" / "runtime-461-v15.scale.xz").read_bytes())
SPEC_VERSION = 461


def hash_of(block: int) -> str:
    return "0x" + hashlib.blake2b(f"node-{block}".encode(), digest_size=32).hexdigest()


class FakeNode:
    """`async with FakeNode() as node:` then `node.url`, `await node.mine(block)`, and the switches below."""

    def __init__(self, block: int = 100) -> None:
        self.block = block
        self.finalized = block
        self.neurons: list[tuple[str, bool]] = []
        """(hotkey, validator permit), by uid."""
        self.silent = False
        """Answer nothing any more, but stay connected."""
        self.asked: list[str] = []
        """Methods of the requests."""
        self.connections: set[ServerConnection] = set()
        self.port = 0
        self._heads: dict[ServerConnection, str] = {}
        self._server: Server | None = None
        self._codec = RuntimeCodec(
            strip_option_opaque_metadata(METADATA),
            spec_version=SPEC_VERSION,
            transaction_version=1,
            spec_name="node-subtensor",
            ss58_format=42,
        )

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    async def __aenter__(self) -> FakeNode:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen; after a stop on the same port again."""
        self._server = await serve(self._serve, "127.0.0.1", self.port, max_size=2**24, close_timeout=1)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            self._server = None

    async def mine(self, block: int, *, finalized: int | None = None) -> None:
        """Make `block` the head, `finalized` (or `block` too) the finalized one, and tell subscribers."""
        self.block = block
        self.finalized = block if finalized is None else finalized
        if not self.silent:
            for connection, subscription in list(self._heads.items()):
                params = {"subscription": subscription, "result": self._header(block)}
                await connection.send(json.dumps({"jsonrpc": "2.0", "method": "chain_newHead", "params": params}))

    async def hang_up(self, code: int) -> None:
        """Close every connection with a WebSocket code."""
        await asyncio.gather(*(connection.close(code) for connection in list(self.connections)))

    async def subscribed(self) -> None:
        """Wait until somebody subscribes to heads."""
        while not self._heads:
            await asyncio.sleep(0.005)

    async def _serve(self, connection: ServerConnection) -> None:
        self.connections.add(connection)
        try:
            async for text in connection:
                asked = json.loads(text)
                answers = [self._answer(connection, one) for one in (asked if isinstance(asked, list) else [asked])]
                if not self.silent:
                    await connection.send(json.dumps(answers if isinstance(asked, list) else answers[0]))
        finally:
            self.connections.discard(connection)
            self._heads.pop(connection, None)

    def _answer(self, connection: ServerConnection, request: dict[str, Any]) -> dict[str, Any]:
        method, params = request["method"], request["params"]
        self.asked.append(method)
        answer: dict[str, Any] = {"jsonrpc": "2.0", "id": request["id"]}
        if method == "chain_subscribeNewHeads":
            self._heads[connection] = f"heads-{id(connection)}"
        try:
            answer["result"] = self._result(connection, method, params)
        except KeyError:
            answer["error"] = {"code": -32601, "message": f"Method not found: {method}"}
        return answer

    def _result(self, connection: ServerConnection, method: str, params: list[Any]) -> Any:
        by_hash = {hash_of(block): block for block in {0, self.block, self.finalized, self.block - 1}}
        if method == "state_call":
            call, arguments = params[0], bytes.fromhex(params[1].removeprefix("0x"))
            if call == "Metadata_metadata_at_version":
                return "0x" + METADATA.hex()
            if call == "SubnetInfoRuntimeApi_get_metagraph":
                return "0x" + self._metagraph(int.from_bytes(arguments, "little")).hex()
            raise KeyError(call)
        if method in ("chain_getHead", "chain_getFinalizedHead"):
            return hash_of(self.block if method == "chain_getHead" else self.finalized)
        if method == "chain_getBlockHash":
            return hash_of(params[0])
        if method == "chain_getHeader":
            return self._header(by_hash[params[0]] if params[0] else self.block)
        if method == "state_getRuntimeVersion":
            return {"specName": "node-subtensor", "specVersion": SPEC_VERSION, "transactionVersion": 1}
        if method == "state_getKeysPaged":  # token symbols
            return []
        if method == "chain_subscribeNewHeads":
            return self._heads[connection]
        if method == "chain_unsubscribeNewHeads":
            return bool(self._heads.pop(connection, None))
        raise KeyError(method)

    def _header(self, block: int) -> dict[str, Any]:
        root = "0x" + "00" * 32
        parent = hash_of(block - 1) if block else root
        return {
            "number": hex(block),
            "parentHash": parent,
            "stateRoot": root,
            "extrinsicsRoot": root,
            "digest": {"logs": []},
        }

    def _metagraph(self, netuid: int) -> bytes:
        """SCALE of Option<Metagraph>: None but for subnet 1; all fields zero but for who is registered."""
        if netuid != 1:
            return b"\0"
        kind = self._codec.runtime_api_map["SubnetInfoRuntimeApi"]["get_metagraph"]["output"]
        graph = self._codec.decode(kind, b"\1" + bytes(5000), strict=False)
        graph["hotkeys"] = graph["coldkeys"] = [hotkey for hotkey, _ in self.neurons]
        graph["validator_permit"] = [permit for _, permit in self.neurons]
        graph["block"] = self.block
        encoded: bytes = self._codec.encode(kind, graph)
        return encoded
