"""Coded units from a real node: they appear beside serving, and are sent with ranges and conditions as units are."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from bzstream.chain.keys import Key, canonical_json, decode_signature, verify
from bzstream.config import load
from bzstream.model.encode_units import encode_current
from bzstream.model.store import Store
from bzstream.node import coding_role
from tests.coding.second_decoder import decode
from tests.model.test_codings import publish_step
from tests.nodes import DEADLINE_S, Node, eventually, running_node

KEY_SEED = b"\x05" * 32
KEY = Key.from_seed(KEY_SEED)


@pytest.fixture(scope="module")
def coding_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node with the versions v0 and v1, signed and coded while it runs."""
    folder = tmp_path_factory.mktemp("coding")
    store = publish_step(folder, 0, KEY)
    with running_node(folder) as node:
        assert "codings" not in manifest(node, 1)
        assert encode_current(store, bases=1, signer=KEY)
        eventually(lambda: "codings" in manifest(node, 1), "v0 is coded")
        publish_step(folder, 1, KEY)
        assert encode_current(store, bases=1, signer=KEY)
        eventually(lambda: len(manifest(node, 1).get("codings", ())) == 2, "v1 is coded, alone and as a difference")
        yield node


def manifest(node: Node, group: int | None, version: str = "") -> dict[str, Any]:
    path = "shared" if group is None else "partial"
    query = f"?version={version}" if version else ""
    found: dict[str, Any] = node.get(f"/model/{path}/manifest{query}", node.headers(group)).json
    return found


def coded_path(coding: Mapping[str, Any], kind: str = "partial") -> str:
    base = f"&base={coding['base']}" if coding["base"] else ""
    return f"/model/{kind}/coded?coding={coding['name']}{base}"


@pytest.mark.parametrize("group", [None, 0, 1])
def test_every_coding_of_a_manifest_is_sent_and_decodes_to_the_unit(coding_node: Node, group: int | None) -> None:
    node, kind = coding_node, "shared" if group is None else "partial"
    headers = node.headers(group)
    found = manifest(node, group)
    assert found["validator_hotkey"] == KEY.ss58_address
    signed = {name: value for name, value in found.items() if name != "signature"}
    assert verify(KEY.ss58_address, canonical_json(signed), decode_signature(found["signature"]))
    plain = node.get(f"/model/{kind}?format=safetensors", headers)
    before = node.get(f"/model/{kind}?format=safetensors&version=v0", headers)
    assert [coding["base"] for coding in found["codings"]] == [before.headers["X-Content-Hash"], None]
    etags = set()
    for coding in found["codings"]:
        answer = node.get(coded_path(coding, kind), headers)
        assert answer.status == 200
        assert len(answer.body) == coding["size"] < 0.75 * len(plain.body)
        assert decode(answer.body, found["size"], before.body if coding["base"] else None) == plain.body
        for name in ("X-Content-Hash", "X-Model-Version", "X-Block-Number", "Last-Modified", "Cache-Control"):
            assert answer.headers[name] == plain.headers[name]
        assert answer.headers.get("Vary") == plain.headers.get("Vary")
        assert answer.headers["Accept-Ranges"] == "bytes"
        etags.add(answer.headers["ETag"])
    assert len(etags - {plain.headers["ETag"]}) == 2


def test_ranges_and_conditions(coding_node: Node) -> None:
    node = coding_node
    coding = manifest(node, 0)["codings"][0]
    path, headers = coded_path(coding), node.headers(0)
    whole = node.get(path, headers)
    part = node.get(path, {**headers, "Range": "bytes=100-199"})
    assert (part.status, part.body) == (206, whole.body[100:200])
    assert part.headers["Content-Range"] == f"bytes 100-199/{len(whole.body)}"
    assert node.get(path, {**headers, "Range": "bytes=0-0,50-60"}).headers["Content-Type"].startswith("multipart/")
    assert node.get(path, {**headers, "Range": f"bytes={len(whole.body)}-"}).status == 416
    assert node.get(path, {**headers, "If-None-Match": whole.headers["ETag"]}).status == 304
    head = node.request("HEAD", path, headers)
    assert (head.status, head.body, head.headers["Content-Length"]) == (200, b"", str(len(whole.body)))


def test_an_older_version_has_its_own_codings(coding_node: Node) -> None:
    found = manifest(coding_node, 0, "v0")
    assert [coding["base"] for coding in found["codings"]] == [None]
    answer = coding_node.get(coded_path(found["codings"][0]) + "&version=v0", coding_node.headers(0))
    assert (answer.status, answer.headers["X-Model-Version"]) == (200, "v0")
    assert len(answer.body) == found["codings"][0]["size"]


HASH = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("query", "group", "status", "code"),
    [
        ("", "0", 400, "invalid_coding"),
        ("?coding=", "0", 400, "invalid_coding"),
        ("?coding=planes-1&base=sha256:ABC", "0", 400, "invalid_base"),
        ("?coding=planes-1&base=../../etc", "0", 400, "invalid_base"),
        ("?coding=planes-1&coding=planes-1", "0", 400, "bad_query"),
        ("?coding=planes-1", "01", 400, "invalid_expert_group"),
        ("?coding=planes-1", "9", 404, "unknown_group"),
        ("?coding=planes-1&version=gone", "0", 404, "unknown_version"),
        ("?coding=planes-2", "0", 404, "unknown_coding"),
        ("?coding=..%2Fgroup-0.safetensors", "0", 404, "unknown_coding"),
        (f"?coding=planes-1&base={HASH}", "0", 404, "unknown_coding"),
    ],
)
def test_refusals(coding_node: Node, query: str, group: str, status: int, code: str) -> None:
    answer = coding_node.get(f"/model/partial/coded{query}", {**coding_node.headers(0), "X-Expert-Group": group})
    assert (answer.status, answer.json["code"]) == (status, code)


def test_an_empty_base_is_none(coding_node: Node) -> None:
    assert coding_node.get("/model/partial/coded?coding=planes-1&base=", coding_node.headers(0)).status == 200


def test_the_full_model_and_a_node_without_codings_have_none(coding_node: Node, node: Node) -> None:
    full = coding_node.get("/model/full/manifest", coding_node.as_validator())
    assert full.status == 200
    assert "codings" not in full.json
    assert coding_node.get("/model/full/coded?coding=planes-1", coding_node.as_validator()).status == 404
    assert "codings" not in manifest(node, 0)
    refused = node.get("/model/partial/coded?coding=planes-1", node.headers(0))
    assert (refused.status, refused.json["code"]) == (404, "unknown_coding")


def test_a_coded_file_that_was_cut_is_not_sent(tmp_path: Path) -> None:
    assert encode_current(publish_step(tmp_path, 0), bases=1)
    with running_node(tmp_path) as node:
        assert "codings" in manifest(node, 0)
        coded = next((node.store / "snapshots" / "v0" / "coded").glob("group-0*planes-1"))
        with coded.open("r+b") as file:
            file.truncate(50)
        answer = node.get("/model/partial/coded?coding=planes-1", node.headers(0))
        assert (answer.status, answer.json["code"]) == (503, "coding_damaged")
        assert node.get("/model/partial", node.headers(0)).status == 200


def test_the_encoder_is_a_child_and_the_least_of_the_nodes_processes(tmp_path: Path) -> None:
    """What it writes, another test sees: on a busy machine this one may wait for a core for minutes."""
    publish_step(tmp_path, 0)
    with running_node(tmp_path, environment={"BZ_CODING_ENABLED": "true"}) as node:
        eventually(lambda: _nice_values(node) == ["19"], "the encoder has the lowest priority")


def test_the_encoder_codes_every_version_that_becomes_current(tmp_path: Path) -> None:
    store = publish_step(tmp_path, 0, KEY)
    key_file = tmp_path / "key"
    key_file.write_text(KEY_SEED.hex())
    key_file.chmod(0o600)
    environment = {"BZ_STORE_PATH": str(store.path), "BZ_NODE_WALLET": str(key_file)}
    settings = load(environment=environment)

    async def both() -> None:
        stop = asyncio.Event()
        running = asyncio.create_task(coding_role.run(settings, stop))
        await _coded(store, "v0")
        await asyncio.to_thread(publish_step, tmp_path, 1, KEY)
        await _coded(store, "v1")
        stop.set()
        await running

    asyncio.run(asyncio.wait_for(both(), DEADLINE_S))


async def _coded(store: Store, version: str) -> None:
    while not (store.folder(version) / "codings.json").exists():
        await asyncio.sleep(0.02)


def _nice_values(node: Node) -> list[str]:
    stats = Path("/proc").glob("[0-9]*/stat")
    return [path.read_text().rsplit(")", 1)[1].split()[16] for path in stats if _is_coding_child(path, node)]


def _is_coding_child(stat: Path, node: Node) -> bool:
    try:
        parent = stat.read_text().rsplit(")", 1)[1].split()[1]
        return parent == str(node.process.pid) and b"coding" in stat.with_name("cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
