"""The download endpoints against a real node: codes in their order, headers, envelope, ranges, conditions, identity."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import io
import json
import struct
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path

import pytest
from blake3 import blake3
from safetensors import safe_open

from bzstream.chain.keys import Key
from bzstream.chain.proofs import sign_request
from bzstream.model import publish
from bzstream.model.store import Store
from tests.api.cutting import AUTH, Rig, open_state, until
from tests.model import build
from tests.nodes import BLOCK, GROUPS, TOKEN, VERSION, Answer, Node, running_node

BEARER = {"Authorization": f"Bearer {TOKEN}"}
HOTKEY = Key.from_seed(b"\x01" * 32).ss58_address
OTHER = Key.from_seed(b"\x03" * 32).ss58_address
MINER = {**BEARER, "X-Hotkey": HOTKEY, "X-Expert-Group": "0"}
UNKNOWN = {"Authorization": "Bearer " + "x" * 40}

REFUSALS: list[tuple[str, str, Mapping[str, str], int, str]] = [
    # 401 before everything, unknown paths too
    ("GET", "/model/partial", {}, 401, "unauthorized"),
    ("GET", "/nowhere", {}, 401, "unauthorized"),
    ("DELETE", "/model/partial", {}, 401, "unauthorized"),
    ("GET", "/model/partial", UNKNOWN, 401, "unauthorized"),
    ("GET", "/model/partial", {"Authorization": f"Basic {TOKEN}"}, 401, "unauthorized"),
    ("GET", "/model/partial", {"Authorization": TOKEN}, 401, "unauthorized"),
    ("GET", "/model/partial", {"Authorization": "Bearer"}, 401, "unauthorized"),
    ("POST", "/submit", {}, 401, "unauthorized"),
    ("GET", "/submissions/550e8400-e29b-41d4-a716-446655440000", {}, 401, "unauthorized"),
    # 404 path, then 405
    ("GET", "/nowhere", BEARER, 404, "not_found"),
    ("GET", "/model/partial/", BEARER, 404, "not_found"),
    ("DELETE", "/nowhere", BEARER, 404, "not_found"),
    ("POST", "/model/partial", BEARER, 405, "method_not_allowed"),
    ("GET", "/submit", BEARER, 405, "method_not_allowed"),
    ("POST", "/health", {}, 405, "method_not_allowed"),
    # 400 headers, before 403 and 404
    ("GET", "/model/partial", BEARER, 400, "invalid_expert_group"),
    ("GET", "/model/partial", {**BEARER, "X-Expert-Group": "0"}, 400, "invalid_hotkey"),
    ("GET", "/model/partial", {**MINER, "X-Hotkey": HOTKEY[:-1] + "1"}, 400, "invalid_hotkey"),
    ("GET", "/model/partial", {**MINER, "X-Hotkey": ""}, 400, "invalid_hotkey"),
    *(
        ("GET", "/model/partial", {**MINER, "X-Expert-Group": group}, 400, "invalid_expert_group")
        for group in ("", "-1", "+0", "00", "01", "1.0", "0x1", "1e1", "1 2", "ten", "1234567890", "²")
    ),
    ("GET", "/model/shared", BEARER, 400, "invalid_hotkey"),
    ("GET", "/model/full", {**BEARER, "X-Hotkey": "nonsense"}, 400, "invalid_hotkey"),
    ("GET", "/model/partial?format=pickle", MINER, 400, "invalid_format"),
    ("GET", "/model/partial?format=safetensors&format=safetensors", MINER, 400, "bad_query"),
    # 403
    ("GET", "/model/full", BEARER, 403, "validators_only"),
    ("GET", "/model/full", {**BEARER, "X-Hotkey": HOTKEY}, 403, "validators_only"),
    ("GET", "/model/full?version=gone", BEARER, 403, "validators_only"),
    ("GET", "/model/full/manifest", BEARER, 403, "validators_only"),
    # 404 group and version
    ("GET", "/model/partial", {**MINER, "X-Expert-Group": "4"}, 404, "unknown_group"),
    ("GET", "/model/partial", {**MINER, "X-Expert-Group": "999999999"}, 404, "unknown_group"),
    ("GET", "/model/partial/manifest", {**MINER, "X-Expert-Group": "4"}, 404, "unknown_group"),
    ("GET", "/model/partial?version=step_1", MINER, 404, "unknown_version"),
    ("GET", "/model/shared?version=../../etc", MINER, 404, "unknown_version"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "headers", "status", "code"), REFUSALS)
def test_refusals(node: Node, method: str, path: str, headers: Mapping[str, str], status: int, code: str) -> None:
    encoded = {name: value.encode("latin-1").decode("latin-1") for name, value in headers.items()}
    answer = node.request(method, path, encoded)
    assert (answer.status, answer.json["code"]) == (status, code)
    assert answer.headers["Content-Type"] == "application/json"
    assert set(answer.json) == {"detail", "code"}
    assert TOKEN not in answer.body.decode()
    assert "/tmp" not in answer.body.decode()
    if status == 401:
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    if status == 405:
        assert answer.headers["Allow"] == ("POST" if path == "/submit" else "GET, HEAD")


@pytest.mark.parametrize("scheme", ["bearer", "BEARER", "Bearer"])
def test_the_scheme_is_case_insensitive(node: Node, scheme: str) -> None:
    assert node.get("/model", {"Authorization": f"{scheme} {TOKEN}"}).status == 200


def unit_file(node: Node, group: int | None) -> bytes:
    name = "shared" if group is None else f"group-{group}"
    return (node.store / "snapshots" / VERSION / f"{name}.safetensors").read_bytes()


@pytest.mark.parametrize("group", [None, *range(GROUPS)])
def test_a_slice_is_envelope_and_payload(node: Node, group: int | None) -> None:
    path = "/model/shared" if group is None else "/model/partial"
    answer = node.get(path, node.headers(group))
    assert answer.status == 200
    (length,) = struct.unpack_from("<Q", answer.body)
    assert (8 + length) % 4096 == 0
    head = answer.body[8 : 8 + length]
    assert head.rstrip(b" ")[-1:] == b"}", "padded with spaces alone"
    payload = answer.body[8 + length :]
    digest = "sha256:" + hashlib.sha256(payload).hexdigest()
    assert list(json.loads(head).items()) == [
        ("expert_group", group),
        ("block_number", BLOCK),
        ("model_version", VERSION),
        ("content_hash", digest),
    ]
    assert payload == unit_file(node, group)
    (safetensors_head,) = struct.unpack_from("<Q", payload)
    assert (8 + safetensors_head) % 4096 == 0, "the data section starts on a page"
    assert_unit_headers(answer, group, digest)
    bare = node.get(f"{path}?format=safetensors", node.headers(group))
    assert bare.body == payload
    assert bare.headers["ETag"] == f'"{digest.removeprefix("sha256:")}"'
    assert answer.headers["ETag"] != bare.headers["ETag"]
    assert_unit_headers(bare, group, digest)


def assert_unit_headers(answer: Answer, group: int | None, digest: str) -> None:
    wanted = {
        "Content-Type": "application/octet-stream",
        "Accept-Ranges": "bytes",
        "X-Expert-Group": None if group is None else str(group),
        "X-Block-Number": str(BLOCK),
        "X-Model-Version": VERSION,
        "X-Content-Hash": digest,
        "Cache-Control": "no-cache, no-transform",
    }
    assert {name: answer.headers[name] for name in wanted} == wanted
    assert answer.headers["Last-Modified"]
    assert answer.headers["ETag"].startswith('"')


def test_the_full_model_is_for_validators(node: Node, tmp_path: Path, checkpoint: Path) -> None:
    answer = node.get("/model/full", node.as_validator())
    assert answer.status == 200
    assert_unit_headers(answer, None, "sha256:" + hashlib.sha256(answer.body).hexdigest())
    file = tmp_path / "model.safetensors"
    file.write_bytes(answer.body)
    import torch

    seen = 0
    with safe_open(file, "pt") as served:
        for shard in sorted(checkpoint.glob("*.safetensors")):
            with safe_open(shard, "pt") as source:
                for name in source.keys():  # noqa: SIM118  safe_open is no mapping
                    left, right = source.get_tensor(name), served.get_tensor(name)
                    assert left.dtype == right.dtype
                    assert torch.equal(left.view(torch.int16), right.view(torch.int16))
                    seen += 1
        assert seen == len(served.keys())


def test_each_slice_equals_the_rows_of_the_source(node: Node, checkpoint: Path) -> None:
    from bzstream.demo.distribution import same_rows

    for group in range(GROUPS):
        file = node.store / "snapshots" / VERSION / f"group-{group}.safetensors"
        assert same_rows(checkpoint, file) == 8


@pytest.mark.parametrize("path", ["/model/partial", "/model/shared", "/model/partial?format=safetensors", "/model"])
def test_head_has_the_headers_of_get(node: Node, path: str) -> None:
    get, head = (node.request(method, path, node.headers(0)) for method in ("GET", "HEAD"))
    assert head.status == get.status == 200
    assert head.body == b""
    changing = {"date"}
    assert {k.lower(): v for k, v in head.headers.items() if k.lower() not in changing} == {
        k.lower(): v for k, v in get.headers.items() if k.lower() not in changing
    }


def test_last_modified_is_the_activation_and_never_in_the_future(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version that is published with the clock two hours ahead, another with the clock put right, then a roll-back:
    whoever holds one of them is told of each other one."""
    specs, now = build.fused(experts=8), int(time.time())
    store = tmp_path / "store"
    seen: list[tuple[str, str]] = []
    held: dict[str, str] = {}

    async def main() -> None:
        async with open_state(store, tmp_path) as state, Rig(state) as rig:

            async def fetch(since: str | None = None) -> Answer:
                peer = rig.connect()
                condition = "" if since is None else f"If-Modified-Since: {since}\r\n"
                peer.push(f"HEAD /model/shared HTTP/1.1\r\n{AUTH}X-Hotkey: {HOTKEY}\r\n{condition}\r\n".encode())
                await until(lambda: peer.take() and peer.received.endswith(b"\r\n\r\n"), "an answer")
                peer.close()
                status, _, fields = bytes(peer.received).decode().partition("\r\n")
                return Answer(int(status.split()[1]), http.client.parse_headers(io.BytesIO(fields.encode())), b"")

            answer = await fetch()
            version, modified = answer.headers["X-Model-Version"] or "", answer.headers["Last-Modified"] or ""
            assert parsedate_to_datetime(modified) <= parsedate_to_datetime(answer.headers["Date"])
            for other, since in seen:
                if other != version:
                    assert (await fetch(since)).status == 200, f"{version} is no {other}"
            seen.append((version, modified))
            held[version] = answer.headers["ETag"] or ""

    for version, clock in (("one", now + 7200), ("two", now), ("three", now)):
        build.write_checkpoint(tmp_path / version, specs, build.contents(specs, len(seen)))
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda at=clock: float(at))
            publish(tmp_path / version, store, block=1, version=version, groups=GROUPS)
        asyncio.run(main())
    Store(store).use("one")
    asyncio.run(main())
    assert [version for version, _ in seen] == ["one", "two", "three", "one"]
    assert len(set(held.values())) == 3


def test_ranges_and_conditions(node: Node) -> None:
    whole = node.get("/model/partial", node.headers(0))
    size, etag, modified = len(whole.body), whole.headers["ETag"], whole.headers["Last-Modified"]

    def ask(**headers: str) -> Answer:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return node.get("/model/partial", {**node.headers(0), **named})

    for text, start, stop in (("0-0", 0, 1), ("4000-9000", 4000, 9001), ("-10", size - 10, size), ("5-", 5, size)):
        part = ask(Range=f"bytes={text}")
        assert part.status == 206
        assert part.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{size}"
        assert part.body == whole.body[start:stop]
        assert part.headers["ETag"] == etag
    for malformed in ("bytes=", "bytes=b-a", "bytes=5-1", "items=0-1", "bytes 0-1"):
        assert ask(Range=malformed).status == 200
    beyond = ask(Range=f"bytes={size}-")
    assert (beyond.status, beyond.headers["Content-Range"]) == (416, f"bytes */{size}")
    assert ask(Range="bytes=" + ",".join(f"{n}-{n}" for n in range(0, 34, 2))).status == 200, "17 ranges are ignored"
    assert ask(Range="bytes=0-1,2-3").headers["Content-Range"] == f"bytes 0-3/{size}", "touching ranges are one"
    several = ask(Range="bytes=0-1,100-101")
    assert several.status == 206
    assert several.headers["Content-Type"].startswith("multipart/byteranges; boundary=")
    assert ask(If_None_Match=etag).status == 304
    assert ask(If_None_Match="*").status == 304
    assert ask(If_None_Match='"other"').status == 200
    assert ask(If_Match='"other"').status == 412
    assert ask(If_Modified_Since=modified).status == 304
    assert ask(If_Unmodified_Since="Thu, 01 Jan 1970 00:00:00 GMT").status == 412
    assert ask(Range="bytes=0-1", If_Range=etag).status == 206
    assert ask(Range="bytes=0-1", If_Range='"other"').status == 200


@pytest.mark.parametrize("group", [0, None])
def test_manifest(node: Node, group: int | None) -> None:
    unit = "shared" if group is None else "partial"
    answer = node.get(f"/model/{unit}/manifest", node.headers(group))
    payload = unit_file(node, group)
    envelope = len(node.get(f"/model/{unit}", node.headers(group)).body) - len(payload)
    chunk = 8388608
    assert answer.json == {
        "unit": unit,
        "expert_group": group,
        "block_number": BLOCK,
        "model_version": VERSION,
        "content_hash": "sha256:" + hashlib.sha256(payload).hexdigest(),
        "payload_offset": envelope,
        "size": len(payload),
        "chunk_size": chunk,
        "chunk_hash": "blake3",
        "chunks": [blake3(payload[at : at + chunk]).hexdigest() for at in range(0, len(payload), chunk)],
        "validator_hotkey": None,
        "signature": None,
    }


def test_the_full_manifest_has_no_offset(node: Node) -> None:
    manifest = node.get("/model/full/manifest", node.as_validator()).json
    body = node.get("/model/full", node.as_validator()).body
    assert (manifest["payload_offset"], manifest["size"]) == (0, len(body))
    assert manifest["chunks"][-1] == blake3(body[8388608 * (len(manifest["chunks"]) - 1) :]).hexdigest()


def test_a_cache_keeps_groups_apart(node: Node) -> None:
    """One URL stands for every group: every answer that depends on the group says so."""
    etag = node.request("HEAD", "/model/partial", node.headers(0)).headers["ETag"]
    for path in ("/model/partial", "/model/partial?format=safetensors", "/model/partial/manifest"):
        for method, more in (
            ("GET", {}),
            ("HEAD", {}),
            ("GET", {"Range": "bytes=0-9"}),
            ("GET", {"Range": "bytes=0-9,20-29"}),
            ("GET", {"If-None-Match": etag}),
        ):
            answer = node.request(method, path, {**node.headers(0), **more})
            assert answer.status in (200, 206, 304)
            assert answer.headers["Vary"] == "X-Expert-Group", (path, method, more)
    for path in ("/model/shared", "/model/shared/manifest", "/model"):
        assert node.get(path, node.headers(0)).headers["Vary"] is None


def test_the_index_lists_every_unit(node: Node) -> None:
    index = node.get("/model", BEARER).json
    assert (index["current"], index["validator_hotkey"]) == (VERSION, None)
    (version,) = index["versions"]
    assert version["signed"] is False
    assert (version["model_version"], version["block_number"]) == (VERSION, BLOCK)
    listed = {(u["unit"], u["expert_group"]): u for u in version["units"]}
    assert set(listed) == {("shared", None), ("full", None), *(("partial", g) for g in range(GROUPS))}
    slice_ = node.request("HEAD", "/model/partial", node.headers(1))
    assert listed["partial", 1]["etag_enveloped"] == slice_.headers["ETag"]
    assert listed["partial", 1]["content_hash"] == slice_.headers["X-Content-Hash"]


def test_a_retained_version_can_be_asked_for(node: Node) -> None:
    assert node.request("HEAD", f"/model/partial?version={VERSION}", node.headers(0)).status == 200


def test_hotkeys_that_differ_are_refused(node: Node) -> None:
    bound = node.as_validator()
    assert node.request("HEAD", "/model/full", {**bound, "X-Hotkey": node.validator.ss58_address}).status == 200
    answer = node.get("/model/full", {**bound, "X-Hotkey": OTHER})
    assert (answer.status, answer.json["code"]) == (403, "hotkey_mismatch")
    answer = node.get("/model/partial", {**bound, "X-Hotkey": OTHER, "X-Expert-Group": "0"})
    assert (answer.status, answer.json["code"]) == (403, "hotkey_mismatch")


def test_a_proof_without_a_node_hotkey_is_not_supported(node: Node) -> None:
    proof = sign_request(node.validator, "GET", "/model/full", OTHER)
    answer = node.get("/model/full", {**BEARER, **proof})
    assert (answer.status, answer.json["code"]) == (403, "proof_not_supported")


def test_proofs(node: Node, tmp_path: Path) -> None:
    receiver = Key.from_seed(b"\x05" * 32).ss58_address
    (tmp_path / "store").symlink_to(node.store)
    ledger = ("--ledger", str(tmp_path / "ledger.sqlite"))
    with running_node(tmp_path, *ledger, environment={"BZ_NODE_HOTKEY": receiver}) as second:
        proof = sign_request(node.validator, "HEAD", "/model/full", receiver)
        assert second.request("HEAD", "/model/full", {**BEARER, **proof}).status == 200
        replayed = second.request("HEAD", "/model/full", {**BEARER, **proof})
        assert (replayed.status, replayed.headers["WWW-Authenticate"]) == (401, "Bearer")
        proof = sign_request(node.validator, "GET", "/model/full", receiver)
        assert second.get("/model/full/manifest", {**BEARER, **proof}).json["code"] == "invalid_proof", "re-targeted"
        elsewhere = sign_request(node.validator, "GET", "/model/full", OTHER)
        assert second.get("/model/full", {**BEARER, **elsewhere}).json["code"] == "invalid_proof"
        miner = Key.from_seed(b"\x01" * 32)
        proof = sign_request(miner, "GET", "/model/full", receiver)
        assert second.get("/model/full", {**BEARER, **proof}).json["code"] == "validators_only"
        proof = sign_request(miner, "GET", "/model/shared", receiver)
        answer = second.get("/model/shared", {**BEARER, **proof, "X-Hotkey": OTHER})
        assert (answer.status, answer.json["code"]) == (403, "hotkey_mismatch")
        proof = sign_request(miner, "POST", "/submit", receiver, body=b"{}")
        posted = second.request("POST", "/submit", {**BEARER, **proof}, b"{}")
        assert (posted.status, posted.json["code"]) == (401, "invalid_proof")


def test_health_has_the_four_members_of_the_specification(node: Node) -> None:
    assert node.health() == {"status": "healthy", "model_loaded": True, "current_block": BLOCK, "phase": "train"}


def test_openapi_is_valid(node: Node) -> None:
    from openapi_spec_validator import validate

    document = node.get("/openapi.json").json
    validate(document)
    assert document["openapi"].startswith("3.1")
    assert set(document["paths"]) >= {"/model/partial", "/model/shared", "/model/full", "/submit", "/health", "/scores"}
