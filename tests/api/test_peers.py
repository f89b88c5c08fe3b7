"""What only validators are given beside the full model: the snapshot's description, and the experts of no group."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator

import pytest

from bzstream.chain.keys import Key, canonical_json, decode_signature, verify
from bzstream.model import publish
from bzstream.model.encode_units import encode_current
from bzstream.model.store import Store
from tests.coding.second_decoder import decode
from tests.model import build
from tests.nodes import TOKEN, Node, eventually, running_node

SEED = "77" * 32
HOTKEY = Key.from_seed(bytes.fromhex(SEED)).ss58_address
EXPERTS = {0: dict.fromkeys(range(2), (0, 1)), 1: dict.fromkeys(range(2), (5, 3))}
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node with a wallet, whose model has eight experts a layer, four of them in no group."""
    folder = tmp_path_factory.mktemp("peer")
    (folder / "key").write_text(SEED)
    for number, version in enumerate(("one", "two")):
        specs = build.fused(experts=8)
        build.write_checkpoint(folder / version, specs, build.contents(specs, number))
        (folder / version / "tokenizer.json").write_text('{"of": "one and two"}')
        signer = Key.from_seed(bytes.fromhex(SEED))
        publish(folder / version, folder / "store", block=7, version=version, experts=EXPERTS, signer=signer)
        assert encode_current(Store(folder / "store"), bases=1, signer=signer)
    with running_node(folder, environment={"BZ_NODE_WALLET": str(folder / "key")}) as node:
        yield node


def test_the_snapshot_for_another_validator(peer: Node) -> None:
    answer = peer.get("/model/snapshot", peer.as_validator())
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    told = answer.json
    assert set(told) == {
        *("model_version", "block_number", "sequence", "units", "expert_map", "files", "validator_hotkey", "signature")
    }
    assert (told["model_version"], told["block_number"], told["validator_hotkey"]) == ("two", 7, HOTKEY)
    assert told["expert_map"] == json.loads(json.dumps(EXPERTS))
    listed = {unit["name"]: unit for unit in told["units"]}
    assert set(listed) == {"shared", "partial/0", "partial/1", "ungrouped", "full"}
    for name, file in (("shared", "shared"), ("partial/1", "group-1"), ("ungrouped", "ungrouped")):
        content = (peer.folder / f"store/current/{file}.safetensors").read_bytes()
        assert listed[name]["size"] == len(content)
        assert listed[name]["content_hash"] == "sha256:" + hashlib.sha256(content).hexdigest()
    files = {file["name"]: file for file in told["files"]}
    assert set(files) == {"config.json", "tokenizer.json"}
    for name, file in files.items():
        content = (peer.folder / "two" / name).read_bytes()
        assert base64.b64decode(file["content"], validate=True) == content
        assert (file["size"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    signature = decode_signature(told.pop("signature"))
    assert verify(HOTKEY, canonical_json(told), signature)
    assert not verify(HOTKEY, canonical_json({**told, "sequence": told["sequence"] + 1}), signature)


def test_the_sequence_rises_with_every_activation(peer: Node) -> None:
    def told() -> dict[str, object]:
        found: dict[str, object] = peer.get("/model/snapshot", peer.as_validator()).json
        return found

    first = told()
    older = peer.get("/model/snapshot?version=one", peer.as_validator()).json
    assert older["sequence"] < first["sequence"]
    Store(peer.folder / "store").use("one")
    back = eventually(lambda: (now := told())["model_version"] == "one" and now, "the roll-back is in force")
    assert back["sequence"] > first["sequence"]
    Store(peer.folder / "store").use("two")
    again = eventually(lambda: (now := told())["model_version"] == "two" and now, "the next one, too")
    assert again["sequence"] > back["sequence"]


def test_the_experts_of_no_group(peer: Node) -> None:
    answer = peer.get("/model/ungrouped?format=safetensors", peer.as_validator())
    assert answer.body == (peer.folder / "store/current/ungrouped.safetensors").read_bytes()
    assert answer.headers["X-Expert-Group"] is None
    enveloped = peer.get("/model/ungrouped", peer.as_validator()).body
    manifest = peer.get("/model/ungrouped/manifest", peer.as_validator()).json
    assert (manifest["unit"], manifest["expert_group"]) == ("ungrouped", None)
    assert enveloped[manifest["payload_offset"] :] == answer.body
    signature = decode_signature(manifest.pop("signature"))
    assert verify(HOTKEY, canonical_json(manifest), signature)
    (units,) = [v["units"] for v in peer.get("/model", BEARER).json["versions"] if v["model_version"] == "two"]
    assert "ungrouped" in {unit["unit"] for unit in units}


def test_the_experts_of_no_group_coded(peer: Node) -> None:
    manifest = peer.get("/model/ungrouped/manifest?version=two", peer.as_validator()).json
    plain = peer.get("/model/ungrouped?format=safetensors&version=two", peer.as_validator()).body
    base = peer.get("/model/ungrouped?format=safetensors&version=one", peer.as_validator())
    assert {coding["base"] for coding in manifest["codings"]} == {None, base.headers["X-Content-Hash"]}
    for coding in manifest["codings"]:
        path = f"/model/ungrouped/coded?version=two&coding={coding['name']}"
        path += f"&base={coding['base']}" if coding["base"] else ""
        sent = peer.get(path, peer.as_validator())
        assert (sent.status, len(sent.body)) == (200, coding["size"])
        assert decode(sent.body, manifest["size"], base.body if coding["base"] else None) == plain
        refused = peer.get(path, peer.headers())
        assert (refused.status, refused.json["code"]) == (403, "validators_only")


def test_validators_only(peer: Node, node: Node) -> None:
    for path in ("/model/snapshot", "/model/ungrouped", "/model/ungrouped/manifest"):
        refused = peer.get(path, peer.headers())
        assert (refused.status, refused.json["code"]) == (403, "validators_only")
    for path in ("/model/ungrouped", "/model/ungrouped/manifest"):
        absent = node.get(path, node.as_validator())
        assert (absent.status, absent.json["code"]) == (404, "unknown_unit")
    assert peer.get("/model/snapshot?version=gone", peer.as_validator()).status == 404
    unsigned = node.get("/model/snapshot", node.as_validator()).json
    assert (unsigned["validator_hotkey"], unsigned["signature"]) == (None, None)


def test_a_small_file_that_was_changed_is_not_handed_on(peer: Node) -> None:
    assert peer.get("/model/snapshot", peer.as_validator()).status == 200
    file = peer.folder / "store/snapshots/one/files/tokenizer.json"
    content = file.read_bytes()
    file.write_bytes(content.replace(b"one", b"two"))
    answer = peer.get("/model/snapshot?version=one", peer.as_validator())
    file.write_bytes(content)
    assert (answer.status, answer.json["code"]) == (503, "snapshot_unavailable")
    assert answer.headers["Retry-After"]
    healed = peer.get("/model/snapshot?version=one", peer.as_validator())
    assert json.loads(healed.body)["model_version"] == "one"
