"""A Bittensor node on loopback, as far as the SDK can tell: JSON-RPC over a WebSocket before a chain in memory.

It answers what the SDK asks for connecting, heads, finality, storage, the metagraph and extrinsics, and misbehaves on
demand. The chain behind it is `subtensor`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from tests.chain.runtime import opaque_metadata, runtime
from tests.chain.subtensor import VERSION, Block, PoolError, Subtensor, hash_of

__all__ = ["FakeNode", "hash_of"]


class FakeNode:
    """`async with FakeNode() as node:` then `node.url`, `await node.mine(block)`, and the switches below."""

    def __init__(self, block: int = 100) -> None:
        self.chain = Subtensor(block)
        self.as_recorded = False
        """Give out the runtime's metadata without the storage item that the tests add."""
        self.silent = False
        """Answer nothing any more, but stay connected."""
        self.asked: list[str] = []
        """Methods of the requests."""
        self.keys_read: list[str] = []
        """Keys of storage that were asked for one by one."""
        self.pool_answers: list[PoolError] = []
        """What the next extrinsics are refused with, the first first."""
        self.after_submit: str | None = None
        """What becomes of the next extrinsic that the pool has taken: "hang_up" closes the connection, "drop" forgets
        the extrinsic and closes it."""
        self.connections: set[ServerConnection] = set()
        self.port = 0
        self._heads: dict[ServerConnection, str] = {}
        self._watches: list[tuple[ServerConnection, str, str]] = []
        """Connection, subscription and hash of each extrinsic that somebody watches."""
        self._server: Server | None = None
        self._changed = asyncio.Event()

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    @property
    def block(self) -> int:
        return self.chain.head.number

    @block.setter
    def block(self, number: int) -> None:
        self.chain.mine(number)

    @property
    def finalized(self) -> int:
        return self.chain.finalized

    @finalized.setter
    def finalized(self, number: int) -> None:
        self.chain.finalized = number

    @property
    def neurons(self) -> list[tuple[str, bool]]:
        return self.chain.neurons

    @neurons.setter
    def neurons(self, neurons: list[tuple[str, bool]]) -> None:
        self.chain.neurons = neurons

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
        """Make `block` the head with what the pool holds, `finalized` (or `block` too) final, and tell subscribers."""
        made = self.chain.mine(block)
        self.finalized = block if finalized is None else finalized
        if self.silent:
            return
        for connection, subscription in list(self._heads.items()):
            await _notify(connection, "chain_newHead", subscription, self._header(made))
        for connection, subscription, extrinsic in list(self._watches):
            where = [at for at in self.chain.blocks.values() if any(one.hash == extrinsic for one in at.extrinsics)]
            if where:
                if where[-1] is made:
                    await _notify(connection, "author_extrinsicUpdate", subscription, {"inBlock": where[-1].hash})
                if where[-1].number <= self.finalized:
                    await _notify(connection, "author_extrinsicUpdate", subscription, {"finalized": where[-1].hash})

    async def hang_up(self, code: int) -> None:
        """Close every connection with a WebSocket code."""
        await asyncio.gather(*(connection.close(code) for connection in list(self.connections)))

    async def subscribed(self, seconds: float = 60) -> None:
        """Wait until somebody subscribes to heads."""
        await self.until(lambda: bool(self._heads), seconds)

    async def until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Wait until a condition holds; it is looked at after every request."""
        async with asyncio.timeout(seconds):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def _serve(self, connection: ServerConnection) -> None:
        self.connections.add(connection)
        try:
            async for text in connection:
                asked = json.loads(text)
                try:
                    answers = [self._answer(connection, one) for one in (asked if isinstance(asked, list) else [asked])]
                except ConnectionAbortedError:
                    await connection.close(1011)
                    break
                if not self.silent:
                    await connection.send(json.dumps(answers if isinstance(asked, list) else answers[0]))
                self._changed.set()
        finally:
            self.connections.discard(connection)
            self._heads.pop(connection, None)
            self._watches = [watch for watch in self._watches if watch[0] is not connection]
            self._changed.set()

    def _answer(self, connection: ServerConnection, request: dict[str, Any]) -> dict[str, Any]:
        method, params = request["method"], request["params"]
        self.asked.append(method)
        answer: dict[str, Any] = {"jsonrpc": "2.0", "id": request["id"]}
        try:
            answer["result"] = self._result(connection, method, params)
        except PoolError as error:
            answer["error"] = error.answer
        except KeyError:
            answer["error"] = {"code": -32601, "message": f"Method not found: {method}"}
        return answer

    def _result(self, connection: ServerConnection, method: str, params: list[Any]) -> Any:
        chain = self.chain
        match method:
            case "state_call":
                return "0x" + self._call(params[0], bytes.fromhex(params[1].removeprefix("0x"))).hex()
            case "chain_getHead":
                return chain.head.hash
            case "chain_getFinalizedHead":
                return chain.hash_at(chain.finalized)
            case "chain_getBlockHash":
                return chain.hash_at(params[0])
            case "chain_getHeader":
                return self._header(self._block(params[0]))
            case "chain_getBlock":
                block = self._block(params[0])
                extrinsics = ["0x" + extrinsic.data.hex() for extrinsic in block.extrinsics]
                return {"block": {"header": self._header(block), "extrinsics": extrinsics}}
            case "state_getStorageAt":
                self.keys_read.append(params[0])
                value = chain.read(bytes.fromhex(params[0][2:]), self._block(params[1]))
                return None if value is None else "0x" + value.hex()
            case "state_getStorage":  # the older name of the same method
                return self._result(connection, "state_getStorageAt", params)
            case "state_queryStorageAt":
                block = self._block(params[1])
                values = [chain.read(bytes.fromhex(key[2:]), block) for key in params[0]]
                found = [None if value is None else "0x" + value.hex() for value in values]
                return [{"block": block.hash, "changes": list(zip(params[0], found, strict=True))}]
            case "state_getRuntimeVersion":
                return VERSION
            case "state_getKeysPaged":
                prefix, count, after, at = params
                keys = chain.keys(bytes.fromhex(prefix[2:]), self._block(at))
                return ["0x" + key.hex() for key in keys if key > bytes.fromhex(after[2:])][:count]
            case "account_nextIndex":
                return chain.next_nonce(params[0])
            case "author_submitAndWatchExtrinsic":
                if self.pool_answers:
                    raise self.pool_answers.pop(0)
                extrinsic = chain.submit(bytes.fromhex(params[0][2:]))
                subscription = f"watch-{len(chain.included)}-{extrinsic.hash}"
                self._watches.append((connection, subscription, extrinsic.hash))
                if self.after_submit is not None:
                    if self.after_submit == "drop":
                        chain.pool.remove(extrinsic)
                    self.after_submit = None
                    raise ConnectionAbortedError
                return subscription
            case "author_unwatchExtrinsic":
                self._watches = [watch for watch in self._watches if watch[1] != params[0]]
                return True
            case "chain_subscribeNewHeads":
                return self._heads.setdefault(connection, f"heads-{id(connection)}")
            case "chain_unsubscribeNewHeads":
                return bool(self._heads.pop(connection, None))
        raise KeyError(method)

    def _call(self, call: str, arguments: bytes) -> bytes:
        match call:
            case "Metadata_metadata_at_version":
                return opaque_metadata(recorded=self.as_recorded)
            case "SubnetInfoRuntimeApi_get_metagraph":
                return self.chain.metagraph(int.from_bytes(arguments, "little"))
            case "TransactionPaymentApi_query_info":
                kind = runtime().runtime_api_map()["TransactionPaymentApi"]["query_info"]["output"]
                info = {"weight": {"ref_time": 1, "proof_size": 1}, "class": "Normal", "partial_fee": 0}
                return bytes(runtime().encode(kind, info))
        raise KeyError(call)

    def _block(self, hash_: str | None) -> Block:
        """The block of a hash; one that was never mined by itself is empty, with the storage of the head."""
        if hash_ is None:
            return self.chain.head
        known = self.chain.blocks.get(hash_)
        if known is None:
            number = next(n for n in range(self.block + 1) if hash_of(n) == hash_)
            known = self.chain.blocks[hash_] = Block(number, hash_, storage=dict(self.chain.storage))
        return known

    def _header(self, block: Block) -> dict[str, Any]:
        root = "0x" + "00" * 32
        return {
            "number": hex(block.number),
            "parentHash": self.chain.hash_at(block.number - 1) if block.number else root,
            "stateRoot": root,
            "extrinsicsRoot": root,
            "digest": {"logs": []},
        }


async def _notify(connection: ServerConnection, method: str, subscription: str, result: object) -> None:
    params = {"subscription": subscription, "result": result}
    with contextlib.suppress(ConnectionClosed):  # it goes on without those who left
        await connection.send(json.dumps({"jsonrpc": "2.0", "method": method, "params": params}))
