"""From the bytes of a request to the head of its answer."""

from __future__ import annotations

from pytest_benchmark.fixture import BenchmarkFixture

from bzstream.http import Representation, Request
from bzstream.http.protocol import ranges
from bzstream.http.protocol.peers import TrustedProxies
from bzstream.http.protocol.request_parser import check_head, find_head, make_request, parse_head, parse_new_head
from bzstream.http.protocol.response import select, serialise_head
from bzstream.model.record import make_envelope
from bzstream.payload import Payload

HEAD = (
    b"GET /model/partial?format=safetensors HTTP/1.1\r\nHost: validator.example:8000\r\n"
    b"Authorization: Bearer 0123456789abcdef0123456789abcdef\r\nX-Expert-Group: 3\r\n"
    b"X-Hotkey: 5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty\r\nRange: bytes=8388608-16777215\r\n"
    b'If-Range: "0123456789abcdef"\r\nAccept: */*\r\nUser-Agent: bzstream/0.1.0\r\n\r\n'
)
SLICE = 3_623_882_752


def request() -> Request:
    """The request in HEAD, as the router gets it."""
    return make_request(parse_head(HEAD, 100), "127.0.0.1", False, TrustedProxies(()))


def test_find_and_check_a_head(benchmark: BenchmarkFixture) -> None:
    def gate() -> int:
        end = find_head(HEAD, 0)
        check_head(HEAD[:end], 100)
        return end

    assert benchmark(gate) == len(HEAD)


def test_read_a_new_head(benchmark: BenchmarkFixture) -> None:
    """Gate and h11, as for a head that was not seen before."""
    assert benchmark(parse_new_head, HEAD, 100).method == "GET"


def test_read_a_remembered_head(benchmark: BenchmarkFixture) -> None:
    assert benchmark(request).method == "GET"


def test_parse_one_range(benchmark: BenchmarkFixture) -> None:
    assert benchmark(ranges.resolve, "bytes=8388608-16777215", SLICE) == [(8388608, 16777216)]


def test_parse_sixteen_ranges(benchmark: BenchmarkFixture) -> None:
    field = "bytes=" + ",".join(f"{n * 2_000_000}-{n * 2_000_000 + 999_999}" for n in range(16))
    assert len(benchmark(ranges.resolve, field, SLICE) or ()) == 16


def test_refuse_a_hostile_range(benchmark: BenchmarkFixture) -> None:
    assert benchmark(ranges.resolve, "bytes=" + "0-," * 2000 + "x", SLICE) is None


def test_select_a_range(benchmark: BenchmarkFixture) -> None:
    """Conditions and range of a request, to the answer's fields and payload."""
    chosen = Representation(Payload((bytes(17 << 20),)), '"0123456789abcdef"', 1_700_000_000, label="partial/3")
    asked = request()
    assert benchmark(select, asked, chosen, 1_700_000_100) is not None


def test_write_a_response_head(benchmark: BenchmarkFixture) -> None:
    fields = [
        ("Date", "Sun, 22 Nov 2026 22:00:00 GMT"),
        ("Server", "bzstream"),
        ("Content-Type", "application/octet-stream"),
        ("Content-Range", f"bytes 8388608-16777215/{SLICE}"),
        ("ETag", '"' + "0" * 64 + '"'),
        ("Accept-Ranges", "bytes"),
        ("X-Expert-Group", "3"),
        ("X-Block-Number", "12345"),
        ("X-Model-Version", "step_1000"),
        ("X-Content-Hash", "sha256:" + "0" * 64),
        ("Cache-Control", "no-cache, no-transform"),
        ("Content-Length", "8388608"),
    ]
    assert benchmark(serialise_head, 206, fields)


def test_make_an_envelope(benchmark: BenchmarkFixture) -> None:
    content_hash = "sha256:" + "0" * 64
    made = benchmark(make_envelope, group=3, block=12345, version="step_1000", content_hash=content_hash)
    assert len(made) == 4096
