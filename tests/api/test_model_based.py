"""Random requests, valid and not, on several connections, pipelined and cut at random bytes, under a moving chain:
every answer is compared with what `tests.api.contract` says."""

from __future__ import annotations

import json
import re
import socket
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    rule,
    run_state_machine_as_test,
)

from bzstream.chain.keys import Key
from tests.api.conftest import SMALL
from tests.api.contract import Ask, Want, World, good_body, known, parse_multipart
from tests.api.desk import Desk, new_key, troubles
from tests.http.support import Answer, Client
from tests.nodes import TOKEN, Node, running_node
from tests.seeds import seeds

MINER = known(Key.from_seed(b"\x01" * 32)).ss58_address
CURRENT = "<its etag>"
WANTED = {200, 202, 206, 304, 400, 401, 403, 404, 405, 409, 412}
"""What has to come up for the test to have tested something, in so many runs at the most."""
ROUNDS = 5

positions = st.one_of(st.integers(0, 9000), st.sampled_from([0, 4095, 4096, 10**6]))
pairs = st.one_of(
    st.tuples(positions, positions), st.tuples(positions, st.none()), st.tuples(st.none(), st.integers(0, 9000))
)
tags = st.sampled_from([None] * 9 + ["*", '"other"', CURRENT])
few = st.integers(0, 11).map(lambda n: n == 0)


def weighted(usual: object, *rare: object) -> st.SearchStrategy[object]:
    return st.sampled_from([usual] * (12 * len(rare)) + list(rare))


def downloads_of(node: Node) -> st.SearchStrategy[Ask]:
    """Downloads with nothing wrong but, at times, their conditions and ranges."""
    return st.builds(
        Ask,
        method=st.sampled_from(["GET", "GET", "GET", "HEAD"]),
        path=st.sampled_from(["/model/partial", "/model/shared", "/model/full"]),
        query=st.sampled_from(["", "?format=safetensors", "?version=step_0999"]),
        token=st.just(node.validator_token),
        hotkey=st.just(node.validator.ss58_address),
        group=st.sampled_from(["0", "3"]),
        ranges=st.lists(pairs, min_size=1, max_size=4).map(tuple),
        if_match=tags,
        if_none_match=tags,
        if_range=tags.filter(lambda tag: tag != "*"),
    )


def asks_of(node: Node) -> st.SearchStrategy[Ask]:
    """Anything that a client may send but for submissions, whose bodies need a key."""
    return st.builds(
        Ask,
        method=st.sampled_from(["GET"] * 16 + ["HEAD"] * 3 + ["POST", "PUT", "DELETE", "get"]),
        path=st.sampled_from(
            ["/model/partial"] * 9
            + ["/model/shared"] * 4
            + ["/model/full"] * 4
            + ["/model/partial/manifest", "/model/shared/manifest", "/model/full/manifest", "/model", "/health"]
            + ["/openapi.json", "/scores", "/submit", "/submissions/nobody", "/submissions/", "/nowhere", "/"]
        ),
        query=st.sampled_from(
            [""] * 6
            + ["?format=safetensors", "?version=step_0999", "?version=step_1000&format=safetensors", "?version=step_1"]
            + ["?format=pickle", "?format=safetensors&format=safetensors", "?round=12520", "?round=x", "?other=1"]
        ),
        token=st.sampled_from([TOKEN] * 12 + [node.validator_token] * 5 + [None, "x" * 40]),
        hotkey=st.sampled_from([MINER] * 16 + [None, node.validator.ss58_address, MINER[:-1], MINER[:-1] + "0"]),
        group=st.sampled_from(["0"] * 16 + ["3", "4", "999999999", None, "01", "x", "-1"]),
        ranges=st.one_of(st.none(), st.lists(pairs, min_size=1, max_size=3).map(tuple), st.just(((0, 0),) * 17)),
        if_match=tags,
        if_none_match=tags,
        if_range=tags.filter(lambda tag: tag != "*"),
        body=st.sampled_from([None] * 24 + [b"", b"hello", b"{}", b"x" * 65537]),
        chunks=st.sampled_from([0, 0, 3000]),
        version=weighted("1.1", "1.0", "1.2", "2.0"),
        close=few,
        flaw=weighted(None, "bare LF", "folded", "no colon", "two hosts", "both"),
    )


class Requests(RuleBasedStateMachine):
    """Several clients and the chain. What is drawn depends on nothing but what was drawn before."""

    desk: Desk
    world: World
    bare: dict[tuple[str, int | None, str], str]
    """(kind, group, version) -> ETag of the payload alone."""
    seen: ClassVar[Counter[int]] = Counter()
    """Status -> how often it was answered, so that the test can tell that it tests something."""
    asks: st.SearchStrategy[Ask]
    moves: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.clients: list[Client] = []
        self.keys = [known(new_key()) for _ in range(3)]
        if self.world.miners is not None or self.world.block != 12530:
            self._move(12530, None)

    @rule(block=st.sampled_from((12345, 12519, 12520, 12599, 12600, 12180)), registered=st.sampled_from([None, 0, 2]))
    def move_the_chain(self, block: int, registered: int | None) -> None:
        """A few times in all: each takes a quarter of a second to be in force."""
        if self.moves < 20:
            self._move(block, None if registered is None else [key.ss58_address for key in self.keys[:registered]])

    def _move(self, block: int, miners: list[str] | None) -> None:
        Requests.moves += 1
        if self.world.block == block:  # another block in between, so that this one is seen to be in force
            self.desk.go_to(block - 1)
        self.desk.go_to(block, miners=miners)
        self.world.block, self.world.miners = block, miners

    @rule(data=st.data(), cuts=st.lists(st.integers(0, 5000), max_size=6))
    def send(self, data: st.DataObject, cuts: list[int]) -> None:
        self._play(data, [self._resolved(data.draw(self.asks)) for _ in range(data.draw(st.integers(1, 8)))], cuts)

    @rule(data=st.data(), cuts=st.lists(st.integers(0, 5000), max_size=6))
    def submit(self, data: st.DataObject, cuts: list[int]) -> None:
        """Submissions by three miners, again and again, and questions about them."""
        pipeline = []
        for _ in range(data.draw(st.integers(1, 6))):
            key = data.draw(st.sampled_from([*self.keys, self.world.validator]))
            block = data.draw(st.sampled_from([12520, 12519, 12518, 12517, 12180, 12180, 12179, 12531]))
            body = good_body(key, block, data.draw(st.sampled_from([0, 0, 0, 1, 4])))
            if data.draw(few):
                body = body[: data.draw(st.integers(0, 200))]
            token = data.draw(st.sampled_from([TOKEN] * 4 + [self.desk.node.validator_token]))
            hotkey = data.draw(st.sampled_from([None, None, MINER, key.ss58_address, "nobody"]))
            chunks = data.draw(st.sampled_from([0, 50]))
            pipeline.append(Ask("POST", "/submit", token=token, hotkey=hotkey, body=body, chunks=chunks))
            back = data.draw(st.integers(1, 6))
            if back <= len(self.world.entries):
                pipeline.append(Ask("GET", f"/submissions/{self.world.entries[-back].submission_id}"))
        pipeline.append(Ask("GET", "/scores", "?round=12520"))
        self._play(data, pipeline, cuts)

    @rule(data=st.data(), cut=st.integers(0, 3000))
    def leave_in_the_middle(self, data: st.DataObject, cut: int) -> None:
        client = self._client(data)
        client.send(self._resolved(data.draw(self.asks)).raw()[:cut])
        client.socket.close()
        self.clients.remove(client)

    def _client(self, data: st.DataObject) -> Client:
        """One of the connections, or a new one."""
        index = data.draw(st.integers(0, 3))
        if index >= len(self.clients):
            client = Client(self.desk.node.port)
            client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.clients.append(client)
        return self.clients[min(index, len(self.clients) - 1)]

    def _resolved(self, ask: Ask) -> Ask:
        """With the ETag that the asked for body has, where a condition names it."""
        kind, _, manifest = ask.path.removeprefix("/model/").partition("/")
        version = "step_0999" if "step_0999" in ask.query else "step_1000"
        group = int(ask.group) if kind == "partial" and ask.group in ("0", "3") else None
        etag = '"none"'
        if (kind, group, version) in self.world.etags and not manifest:
            bare = kind == "full" or "safetensors" in ask.query
            etag = self.world.etags[kind, group, version]
            if bare:
                etag = self.bare[kind, group, version]
        named: dict[str, Any] = {
            name: etag for name in ("if_match", "if_none_match", "if_range") if getattr(ask, name) == CURRENT
        }
        return replace(ask, **named)

    def _play(self, data: st.DataObject, pipeline: list[Ask], cuts: list[int]) -> None:
        client = self._client(data)
        raw = b"".join(ask.raw() for ask in pipeline)
        points = sorted({0, len(raw), *(cut % (len(raw) + 1) for cut in cuts)})
        for a, b in pairwise(points):
            try:
                client.send(raw[a:b])
            except ConnectionError:
                break  # an earlier request of the pipeline was the last
        for ask in pipeline:
            want = self.world.want(ask)
            answer = client.read("HEAD" if ask.method == "HEAD" else "GET")
            check(ask, want, answer)
            self.seen[answer.status] += 1
            if answer.status == 202:
                self.world.accepted(ask, json.loads(answer.body)["submission_id"])
            if answer.get("connection") == "close":
                assert client.ends()
                client.socket.close()
                self.clients.remove(client)
                break

    def teardown(self) -> None:
        for client in self.clients:
            client.socket.close()


def check(ask: Ask, want: Want, answer: Answer) -> None:
    """Compare an answer with what the contract wants."""
    assert answer.status == want.status, (ask, answer)
    assert answer.complete
    if want.goes_on is not None:
        assert (answer.get("connection") == "close") == (not want.goes_on), (ask, answer)
    for name, text in want.fields.items():
        assert answer.get(name) == text, (ask, name, answer.headers)
    if want.body is not None:
        assert answer.body == want.body, ask
    if want.parts is not None:
        assert parse_multipart(answer.get("content-type") or "", answer.body) == want.parts, ask
    if answer.status >= 400:
        assert answer.get("content-type") == "application/json"
        if ask.method != "HEAD":
            error = json.loads(answer.body)
            assert re.fullmatch("[a-z][a-z0-9_]*", error["code"])
            assert set(error) == {"detail", "code"} | set(want.json or ())
    if want.json is not None:
        told = json.loads(answer.body)
        if "results" in told:
            told["ids"] = [row["submission_id"] for row in told["results"]]
        assert {name: told[name] for name in want.json} == want.json, ask


@pytest.fixture(scope="module")
def desk_of_small(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    place = tmp_path_factory.mktemp("modelled")
    (place / "store").symlink_to(small_store)
    environment = {"BZ_HTTP_LINGER_S": "0.5", "BZ_HTTP_MAX_CONNECTIONS_PER_CALLER": "1000"}
    with running_node(place, "--ledger", str(place / "ledger.sqlite"), environment=environment) as node:
        yield Desk(node)
        assert troubles(node) == []


def test_random_requests(desk_of_small: Desk) -> None:
    node = desk_of_small.node
    full = {v: node.get(f"/model/full?version={v}", node.as_validator()).body for v, _ in SMALL}
    world = World(node.store, SMALL, full, known(node.validator))
    world.tokens[node.validator_token] = node.validator.ss58_address
    bare = {}
    for version in node.get("/model", node.headers()).json["versions"]:
        for unit in version["units"]:
            place = unit["unit"], unit["expert_group"], version["model_version"]
            world.etags[place], bare[place] = unit["etag_enveloped"], unit["etag"]
    Requests.desk, Requests.world, Requests.bare = desk_of_small, world, bare
    Requests.asks = st.one_of(downloads_of(node), asks_of(node))
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    chosen = settings(
        max_examples=seeds(15, 40),
        stateful_step_count=15,
        deadline=None,
        database=None,
        suppress_health_check=checks,
        phases=(Phase.generate,),
    )
    for _ in range(ROUNDS):
        run_state_machine_as_test(Requests, settings=chosen)
        # Each run draws some kinds of requests more than others, and now and then one not at all.
        if set(Requests.seen) >= WANTED and any(entry.superseded for entry in world.entries):
            break
    assert any(entry.superseded for entry in world.entries)
    assert set(Requests.seen) >= WANTED, Requests.seen
    assert sum(Requests.seen.values()) > seeds(150, 400)
