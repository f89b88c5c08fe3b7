"""The contract's order of checks, for every endpoint: of two faults in one request the earlier one is answered.

400 framing, 401, 404 unknown path, 405, 400 headers or body, 403, 429, 503, 404 unknown group, version or submission,
conditions (304, 412), range (206, 416). POST /submit has its own order, which `test_submissions.py` tests; here it
stands for what comes before a body is read.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import msgspec
import pytest

from bzstream.api.app import Api
from bzstream.api.operations import OPERATIONS, Operation
from bzstream.api.state import WorkerState
from bzstream.chain.proofs import sign_request
from bzstream.chain.state import ChainState
from bzstream.config import NodeSettings
from bzstream.http import Headers, Request
from bzstream.model import SnapshotCache
from bzstream.submissions.ledger import AsyncLedger
from tests.api.cutting import Rig, open_state, until
from tests.api.desk import Desk, new_key
from tests.nodes import TOKEN

MINER, OTHER = new_key().ss58_address, new_key().ss58_address


@dataclass(frozen=True)
class Fault:
    """What is wrong, with the status that it is answered by."""

    name: str
    status: int


# In the contract's order. A fault that an endpoint cannot have is left out for it.
FAULTS = [
    Fault("framing", 400),
    Fault("token", 401),
    Fault("path", 404),
    Fault("method", 405),
    Fault("claim", 400),
    Fault("group header", 400),
    Fault("query", 400),
    Fault("denied", 403),
    Fault("not a validator", 403),
    Fault("connections", 429),
    Fault("draining", 503),
    Fault("chain", 503),
    Fault("not loaded", 503),
    Fault("ledger", 503),
    Fault("group", 404),
    Fault("version", 404),
    Fault("submission", 404),
    Fault("round", 404),
    Fault("condition", 412),
    Fault("unchanged", 304),
    Fault("range", 416),
]


def can_have(operation: Operation, fault: Fault) -> bool:
    named = {parameter.name for parameter in operation.parameters}
    # The store has no codings and no experts without a group, so that their endpoints end with 404.
    selected = operation.ranges and "coding" not in named and operation.name != "ungrouped"
    return {
        "token": not operation.public,
        "claim": "X-Hotkey" in named,
        "group header": "X-Expert-Group" in named,
        "query": bool(named & {"format", "round", "base"}),
        "denied": not operation.public,
        "not a validator": operation.validators,
        "connections": operation.limited,
        "draining": operation.limited or operation.name == "ready",
        "chain": operation.validators,
        "not loaded": operation.path.startswith("/model") or operation.name == "ready",
        "ledger": operation.name in ("submission", "scores", "ready"),
        "group": "X-Expert-Group" in named,
        "version": "version" in named,
        "submission": operation.name == "submission",
        "round": operation.name == "scores",
        "condition": selected,
        "unchanged": selected,
        "range": selected,
    }.get(fault.name, True) and not (operation.method == "POST" and fault.name in ("not loaded", "ledger"))


def raw(operation: Operation, faults: set[str]) -> bytes:
    """A request that has just these faults, as far as they are its own."""
    path = operation.path.replace("{submission_id}", "550e8400-e29b-41d4-a716-446655440000")
    query = {"coding": "none-1"}
    query |= {"version": "gone"} if "version" in faults else {}
    if "query" in faults:
        query |= {"format": "pickle", "round": "x", "base": "x"}
    fields = {
        "Host": "x y" if "framing" in faults else "x",
        "Authorization": f"Bearer {'x' * 40 if 'token' in faults else TOKEN}",
        # Whom the chain does not list is no validator; the claim counts in these tests.
        "X-Hotkey": "5x" if "claim" in faults else OTHER if "not a validator" in faults else MINER,
        "X-Expert-Group": "ten" if "group header" in faults else "77" if "group" in faults else "0",
    }
    fields |= {"If-Match": '"other"'} if "condition" in faults else {}
    fields |= {"If-None-Match": "*"} if "unchanged" in faults else {}
    fields |= {"Range": "bytes=999999999-"} if "range" in faults else {}
    target = ("/nowhere" if "path" in faults else path) + "".join(
        f"{'&' if number else '?'}{name}={value}" for number, (name, value) in enumerate(query.items())
    )
    method = "DELETE" if "method" in faults else operation.method
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    if operation.method == "POST":
        head += "Content-Length: 2\r\n"
    if "framing" in faults:
        head += " folded\r\n"
    return f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode() + (b"{}" if operation.method == "POST" else b"")


@contextmanager
def trouble(
    state: WorkerState, rig: Rig, faults: set[str], empty: SnapshotCache, deny: Callable[[bool], None]
) -> Iterator[None]:
    """The faults that are the node's."""
    snapshots, ledger, chain = state.snapshots, state.ledger, state.chain
    deny("denied" in faults)
    state.snapshots = empty if "not loaded" in faults else snapshots
    state.ledger = None if "ledger" in faults else ledger
    state.chain = None if "chain" in faults else chain
    rig.server.draining = state.draining = "draining" in faults
    try:
        yield
    finally:
        state.snapshots, state.ledger, state.chain = snapshots, ledger, chain
        rig.server.draining = state.draining = False


async def ask(rig: Rig, data: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, fields and body of the answer, on a connection of its own."""
    peer = rig.connect()
    peer.push(data)
    await until(lambda: (peer.take() or True) and (peer.ended or whole(bytes(peer.received))), "the answer")
    head, _, body = bytes(peer.received).partition(b"\r\n\r\n")
    peer.close()
    status, *lines = head.decode("latin-1").split("\r\n")
    return int(status.split()[1]), {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}, body


def whole(received: bytes) -> bool:
    """Whether a head has come with as much of a body as it says."""
    head, end, body = received.partition(b"\r\n\r\n")
    length = [line[16:] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length: ")]
    return bool(end) and len(body) >= int(length[0] if length else 0)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: f"{operation.method} {operation.path}")
def test_of_two_faults_the_earlier_is_answered(operation: Operation, small_store: Path, tmp_path: Path) -> None:
    possible = [fault for fault in FAULTS if can_have(operation, fault)]
    denied = tmp_path / "denied"
    denied.touch()

    async def main() -> None:
        async with open_state(small_store, tmp_path, deny_file=str(denied)) as state:
            state.chain = ChainState(Desk.NOW, time.time(), frozenset({MINER}), frozen=True)
            empty = SnapshotCache(tmp_path / "empty")

            def deny(on: bool) -> None:
                denied.write_text(f"{MINER}\n{OTHER}\n127.0.0.0/8\n" if on else "")
                state.access.refresh()

            async with Rig(state, max_connections_per_caller=1) as one, Rig(state) as many:
                held = one.connect()
                await held.send(raw(OPERATIONS[0], set()))
                await until(lambda: held.take() and whole(bytes(held.received)), "the place is taken")
                for pair in [(fault,) for fault in possible] + list(combinations(possible, 2)):
                    faults = {fault.name for fault in pair}
                    if faults == {"not a validator", "chain"}:
                        continue  # while the chain is not known nobody can be told that he is none
                    rig = one if "connections" in faults else many
                    with trouble(state, rig, faults, empty, deny):
                        status, fields, body = await ask(rig, raw(operation, faults))
                    assert status == pair[0].status, (pair, body)
                    if status >= 400 and not (operation.name == "ready" and status == 503):
                        assert set(json.loads(body)) == {"detail", "code"}
                    assert (fields.get("retry-after", "").isdigit()) == (status in (429, 503)), pair
                    assert ("www-authenticate" in fields) == (status == 401)
                held.close()

    asyncio.run(main())


class CountingLedger:
    """Counts what is asked of a ledger."""

    def __init__(self, ledger: AsyncLedger) -> None:
        self._ledger = ledger
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> object:
        self.asked.append(name)
        return getattr(self._ledger, name)


def test_no_handler_runs_for_a_request_over_its_limit(small_store: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with open_state(small_store, tmp_path) as state, Rig(state, max_connections_per_caller=1) as rig:
            assert state.ledger is not None
            state.ledger = counting = CountingLedger(state.ledger)  # type: ignore[assignment]
            asking = [operation for operation in OPERATIONS if operation.name in ("scores", "submission", "submit")]
            held = rig.connect()
            await held.send(raw(asking[0], set()))
            await until(lambda: held.take() and whole(bytes(held.received)), "the place is taken")
            statuses = [(await ask(rig, raw(operation, set())))[0] for operation in asking]
            assert statuses == [429, 429, 429]
            rig.server.draining = True
            assert (await ask(rig, raw(asking[1], set())))[0] == 429
            rig.server.draining = False
            assert counting.asked == []
            held.close()
            await until(lambda: not rig.server.connections, "the place is free")
            for operation in asking[1:]:
                await ask(rig, raw(operation, set()))
            assert counting.asked == ["find", "scores"], "they are asked otherwise"

    asyncio.run(main())


def test_whom_a_request_counts_for(small_store: Path, tmp_path: Path) -> None:
    """A key that anybody can make gives no share of its own: the chain must list it, or a token be bound to it."""
    key, node = new_key(), new_key().ss58_address
    (tmp_path / "tokens").touch(mode=0o600)
    (tmp_path / "tokens").write_text(f'"{"b" * 40}" = "{OTHER}"\n')

    def caller(state: WorkerState, *, token: str = TOKEN, proof: bool = True) -> str:
        headers = {"authorization": f"Bearer {token}", "x-hotkey": key.ss58_address}
        headers |= {n.lower(): v for n, v in sign_request(key, "GET", "/model", node).items()} if proof else {}
        request = Request("GET", "/model", "/model", "", Headers(list(headers.items())), "192.0.2.1", "192.0.2.1")
        Api(state).admit(request)
        return request.caller

    async def main() -> None:
        async with open_state(small_store, tmp_path, tokens_file=str(tmp_path / "tokens")) as state:
            state.settings = msgspec.structs.replace(state.settings, node=NodeSettings(hotkey=node))
            address, proven = "192.0.2.1", key.ss58_address
            for chain, wanted in (
                (None, address),
                (ChainState(1, 0.0), address),  # the chain does not say who is registered
                (ChainState(1, 0.0, miners=frozenset({OTHER})), address),
                (ChainState(1, 0.0, miners=frozenset({proven})), proven),
                (ChainState(1, 0.0, validators=frozenset({proven})), proven),
            ):
                state.chain = chain
                assert caller(state) == wanted, chain
                assert caller(state, proof=False) == address, "a claim is nothing"
                assert caller(state, token="b" * 40, proof=False) == OTHER

    asyncio.run(main())


def test_ready(small_store: Path, tmp_path: Path) -> None:
    ready, health = (next(o for o in OPERATIONS if o.name == name) for name in ("ready", "health"))

    async def main() -> None:
        async with open_state(small_store, tmp_path) as state, Rig(state) as rig:

            async def compare(wanted: int, what: str) -> None:
                status, fields, body = await ask(rig, raw(ready, set()))
                assert (status, "retry-after" in fields) == (wanted, wanted == 503), what
                alive, _, told = await ask(rig, raw(health, set()))
                ages = [json.loads(text).pop("chain_age_s", 0.0) for text in (body, told)]
                assert alive == 200
                assert abs(ages[0] - ages[1]) < 10
                assert [json.loads(text)["status"] for text in (body, told)] == [json.loads(told)["status"]] * 2
                assert json.loads(body).keys() == json.loads(told).keys()

            chain, ledger, snapshots, now = state.chain, state.ledger, state.snapshots, time.time()
            state.evaluator_age = 0.0
            await compare(200, "all is well")
            state.evaluator_age = None
            state.damaged = ["shared"]
            await compare(200, "degraded, but it serves and takes submissions")
            state.chain = ChainState(12345, now, frozen=True)
            await compare(200, "in any phase")
            for name, value in (
                ("chain", None),
                ("chain", ChainState(Desk.NOW, now - 61)),
                ("ledger", None),
                ("snapshots", SnapshotCache(tmp_path / "empty")),
                ("draining", True),
            ):
                setattr(state, name, value)
                await compare(503, name)
                state.chain, state.ledger, state.snapshots, state.draining = chain, ledger, snapshots, False
            await compare(200, "all is well again")

    asyncio.run(main())
