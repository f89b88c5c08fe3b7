"""What parsing costs: little processor time for any bytes, and no more than in proportion to their number.

The budget of a request's whole head is in `io/test_hostile.py`. Here are the parts that come after it: fields, queries,
paths and bodies.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bzstream.http import Endpoint, Headers, HttpError, Request, Response, Router
from bzstream.http.protocol import conditions, ranges
from bzstream.http.protocol.dates import parse_date
from bzstream.http.protocol.peers import TrustedProxies
from bzstream.http.protocol.request_body import ChunkedBody
from tests.http.corpus import BODIES, FIELDS, PATHS, QUERIES
from tests.seeds import seeds

MOST_S = 0.02
NOW = 1_700_000_000
NAMES = ("if-match", "if-none-match", "if-modified-since", "if-unmodified-since", "if-range", "x-forwarded-for")
PROXIES = TrustedProxies(("127.0.0.0/8", "10.0.0.0/8", "fd00::/8"))


def cost(work: Callable[[], object]) -> float:
    """Thread CPU seconds; the least of some tries."""
    least = 1.0
    for _ in range(3):
        begun = time.thread_time()
        with suppress(HttpError):
            work()
        least = min(least, time.thread_time() - begun)
        if least < MOST_S:
            break
    return least


def read_field(text: str) -> None:
    """Everything that a field's value is parsed by."""
    ranges.resolve(text, 10**9)
    parse_date(text, NOW)
    for name in NAMES:
        headers = Headers([(name, text)])
        conditions.evaluate(headers, '"tag"', NOW, NOW)
        conditions.range_applies(headers, '"tag"', NOW, NOW)
        PROXIES.resolve("127.0.0.1", headers)


def request(path: str = "/", query: str = "") -> Request:
    return Request("GET", path, path, query, Headers([]), "1.2.3.4", "1.2.3.4")


def route(path: str) -> None:
    router, endpoint = Router(), Endpoint(lambda _: Response(200))
    for pattern in ("/health", "/items/{id}", "/a/b/c", "/a/{b}/{c}"):
        router.add("GET", pattern, endpoint)
    router.match(request(path))


def read_body(raw: bytes) -> float:
    """The cost of the most expensive call."""
    body, most, piece = ChunkedBody(65_536, keep=True), 0.0, raw
    while True:
        begun = time.thread_time()
        try:
            done = body.feed(piece)
        except HttpError:
            return most
        most, piece = max(most, time.thread_time() - begun), b""
        if done or not body.pending:
            return most


@pytest.mark.parametrize("name", FIELDS)
def test_fields(name: str) -> None:
    assert cost(lambda: read_field(FIELDS[name])) < MOST_S


@pytest.mark.parametrize("name", QUERIES)
def test_queries(name: str) -> None:
    assert cost(lambda: request(query=QUERIES[name]).query) < MOST_S


@pytest.mark.parametrize("name", PATHS)
def test_paths(name: str) -> None:
    assert cost(lambda: route(PATHS[name])) < MOST_S


@pytest.mark.parametrize("name", BODIES)
def test_bodies(name: str) -> None:
    assert min(read_body(BODIES[name]) for _ in range(3)) < MOST_S / 4


texts = st.lists(
    st.tuples(st.text('0123456789-,="W/ \tab%&+:;[].', min_size=1, max_size=5), st.sampled_from([1, 3, 100, 16_000])),
    min_size=1,
    max_size=4,
)


@settings(max_examples=seeds(60, 2000), deadline=None)
@given(st.sampled_from(["", "bytes=", '"', "a=", "/"]), texts)
def test_no_pattern_costs_20_ms(start: str, pattern: list[tuple[str, int]]) -> None:
    share = 16_000 // len(pattern)
    text = start + "".join((unit * count)[:share] for unit, count in pattern)
    assert cost(lambda: read_field(text)) < MOST_S
    assert cost(lambda: request(query=text).query) < MOST_S
    assert cost(lambda: route("/" + text)) < MOST_S
    assert min(read_body(text.encode()) for _ in range(2)) < MOST_S


@pytest.mark.parametrize("name", FIELDS)
def test_twice_the_bytes_cost_no_more_than_twice_the_time(name: str) -> None:
    """With a margin for what a clock of microseconds sees: what is quadratic costs sixteen times as much here."""
    text = FIELDS[name]
    once = min(cost(lambda: read_field(text)) for _ in range(3))
    four_times = min(cost(lambda: read_field(text[:-1] * 4 + text[-1])) for _ in range(3))
    assert four_times < 8 * once + 0.002
