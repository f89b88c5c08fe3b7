"""Coded files beside a snapshot: what is written, when it is served, and what happens when it is damaged or cut off."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from bzstream.chain.keys import Key, canonical_json, decode_signature, verify
from bzstream.model import SnapshotCache, StoreFailed, Unit, open_snapshot, publish
from bzstream.model.encode_units import encode_current
from bzstream.model.store import Store
from bzstream.model.versions import list_versions

from ..coding.second_decoder import decode
from .build import SPLIT, Spec, fused, tree, write_checkpoint

SPECS: dict[str, Spec] = fused(hidden=64, inner=96)
KEY = Key.from_seed(b"\x05" * 32)


def weights(step: int) -> dict[str, bytes]:
    """bf16 weights, moved a little with every step."""
    found = {}
    for name, (_, shape) in SPECS.items():
        generator = np.random.default_rng([*name.encode()])
        values = generator.standard_normal(shape) * 0.02
        for _ in range(step):
            values = values + generator.standard_normal(shape) * 1e-4
        found[name] = (values.astype(np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    return found


def publish_step(folder: Path, step: int, signer: Key | None = None) -> Store:
    source = folder / f"in-{step}"
    write_checkpoint(source, SPECS, weights(step))
    publish(source, folder / "store", block=step, version=f"v{step}", experts=SPLIT, signer=signer)
    return Store(folder / "store")


def current_units(store: Store) -> dict[str, Unit]:
    """The units of the current version that may be coded, read and closed."""
    snapshot = open_snapshot(store.folder(store.current() or ""))
    try:
        return {label: unit for label, unit in snapshot.units.items() if unit.kind != "full"}
    finally:
        snapshot.release()


def payloads(store: Store, version: str) -> dict[str, bytes]:
    snapshot = open_snapshot(store.folder(version))
    try:
        return {label: unit.payload.read() for label, unit in snapshot.units.items()}
    finally:
        snapshot.release()


def check_codings(store: Store, bases: dict[str, str | None]) -> None:
    """Every unit of the current version has codings for exactly `bases` (version -> its content is a base; "" none),
    its manifest lists them, and what they send decodes to the unit."""
    cache = SnapshotCache(store.path)
    assert cache.refresh()
    snapshot = cache.current
    assert snapshot is not None
    for label in ("partial/0", "partial/1", "shared"):
        unit = snapshot.units[label]
        manifest = json.loads(unit.manifest)
        known = {None if not version else f"sha256:{_sha256(store, version, label)}": version for version in bases}
        assert {coding["base"] for coding in manifest["codings"]} == set(known)
        for coding in manifest["codings"]:
            coded = unit.codings[coding["name"], coding["base"]].payload.read()
            assert len(coded) == coding["size"] < 0.8 * unit.size
            before = payloads(store, known[coding["base"]])[label] if coding["base"] else None
            plain = b""
            for index, (offset, length, digest) in enumerate(coding["chunks"]):
                piece = coded[offset : offset + length]
                assert blake3(piece).hexdigest() == digest
                start = index * manifest["chunk_size"]
                size = min(manifest["chunk_size"], unit.size - start)
                plain += decode(piece, size, before and before[start : start + size])
            assert plain == unit.payload.read()
    cache.close()


def _sha256(store: Store, version: str, label: str) -> str:
    snapshot = open_snapshot(store.folder(version))
    try:
        return snapshot.units[label].content_hash.removeprefix("sha256:")
    finally:
        snapshot.release()


def test_a_first_version_is_coded_alone_and_the_next_also_as_a_difference(tmp_path: Path) -> None:
    store = publish_step(tmp_path, 0)
    plain = current_units(store)
    assert encode_current(store, bases=1)
    check_codings(store, {"": None})
    coded = current_units(store)
    for label, unit in plain.items():
        assert (coded[label].content_hash, coded[label].etag, coded[label].etag_enveloped) == (
            unit.content_hash,
            unit.etag,
            unit.etag_enveloped,
        ), "a coding is no part of what a unit is"
    publish_step(tmp_path, 1)
    assert encode_current(store, bases=1)
    check_codings(store, {"": None, "v0": None})
    publish_step(tmp_path, 2)
    assert encode_current(store, bases=2)
    check_codings(store, {"": None, "v0": None, "v1": None})


def test_a_unit_that_did_not_change_has_no_difference_to_itself(tmp_path: Path) -> None:
    store = publish_step(tmp_path, 0)
    publish(tmp_path / "in-0", store.path, block=5, version="same", experts=SPLIT)
    assert encode_current(store, bases=1)
    check_codings(store, {"": None})


def test_noise_gets_no_coding(tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path / "in", fused(hidden=256, inner=192)
    )  # of random bytes, so large that its head is not much
    publish(tmp_path / "in", tmp_path / "store", block=1, version="noise", groups=2)
    store = Store(tmp_path / "store")
    before = current_units(store)["partial/0"].manifest
    assert encode_current(store, bases=1)
    assert current_units(store)["partial/0"].manifest == before
    assert not [
        name for name in os.listdir(store.folder("noise") / "coded") if "group" in name and name.endswith("planes-1")
    ]


def test_manifests_with_codings_are_signed_anew(tmp_path: Path) -> None:
    store = publish_step(tmp_path, 0, KEY)
    with pytest.raises(StoreFailed, match=r"node\.wallet"):
        encode_current(store, bases=1)
    with pytest.raises(StoreFailed, match=r"node\.wallet"):
        encode_current(store, bases=1, signer=Key.from_seed(b"\x06" * 32))
    assert encode_current(store, bases=1, signer=KEY)
    for unit in current_units(store).values():
        manifest = json.loads(unit.manifest)
        assert manifest["codings"]
        signature = decode_signature(manifest.pop("signature"))
        assert verify(KEY.ss58_address, canonical_json(manifest), signature)


def test_codings_of_another_signer_than_the_snapshots_are_not_served(tmp_path: Path) -> None:
    """A snapshot that was signed after it was coded: its manifests must not lose their signature."""
    store = publish_step(tmp_path, 0)
    assert encode_current(store, bases=1)
    codings = (store.folder("v0") / "codings.json").read_bytes()
    signed = publish_step(tmp_path / "again", 0, KEY)
    (signed.folder("v0") / "codings.json").write_bytes(codings)
    shutil.copytree(store.folder("v0") / "coded", signed.folder("v0") / "coded")
    assert all("codings" not in json.loads(unit.manifest) for unit in current_units(signed).values())
    assert encode_current(signed, bases=1, signer=KEY), "what is coded is signed, not coded again"
    check_codings(signed, {"": None})


def test_stopping_and_going_on(tmp_path: Path) -> None:
    """What is complete when it stops is not made again; nothing half is left in its place."""
    store = publish_step(tmp_path, 0)
    coded = store.folder("v0") / "coded"
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 2  # each unit has one chunk

    assert not encode_current(store, bases=1, stop=stop)
    complete = {path.name: path.stat() for path in coded.iterdir()}
    assert len(complete) == 4
    assert "codings" not in json.loads(current_units(store)["shared"].manifest)
    assert encode_current(store, bases=1)
    for name, status in complete.items():
        assert (coded / name).stat().st_mtime_ns == status.st_mtime_ns
    check_codings(store, {"": None})
    before = tree(store.folder("v0"))
    assert encode_current(store, bases=1, stop=lambda: pytest.fail("there is nothing to do"))
    assert tree(store.folder("v0")) == before


def test_a_restart_takes_no_coding_back(tmp_path: Path) -> None:
    """Clients are using what codings.json lists: it does not shrink while what is complete is gone through again."""
    store = publish_step(tmp_path, 0)
    publish_step(tmp_path, 1)
    assert encode_current(store, bases=1)
    before = (store.folder("v1") / "codings.json").read_bytes()
    next((store.folder("v1") / "coded").glob("group-0*alone*.json")).unlink()
    assert not encode_current(store, bases=1, stop=lambda: True)
    assert (store.folder("v1") / "codings.json").read_bytes() == before


@pytest.mark.parametrize("left", ["partly written", "without its entry", "cut"])
def test_what_a_kill_leaves_behind_is_made_again(tmp_path: Path, left: str) -> None:
    store = publish_step(tmp_path, 0)
    assert encode_current(store, bases=1)
    before = tree(store.folder("v0"))
    coded = store.folder("v0") / "coded"
    victim = next(path for path in coded.iterdir() if path.name.startswith("group-0") and path.suffix != ".json")
    if left == "partly written":
        (coded / f".{victim.name}.new").write_bytes(b"half")
        victim.unlink()
    elif left == "without its entry":
        victim.with_name(f"{victim.name}.json").unlink()
    else:
        os.truncate(victim, 100)
    assert encode_current(store, bases=1)
    assert tree(store.folder("v0")) == before


def test_a_coded_file_that_is_missing_or_cut_takes_back_its_units_codings_alone(tmp_path: Path) -> None:
    store = publish_step(tmp_path, 0)
    plain = {label: unit.manifest for label, unit in current_units(store).items()}
    assert encode_current(store, bases=1)
    coded = {label: unit.manifest for label, unit in current_units(store).items()}
    for damage in (lambda path: os.truncate(path, 100), lambda path: path.unlink()):
        victim = next((store.folder("v0") / "coded").glob("group-0*planes-1"))
        damage(victim)
        now = {label: unit.manifest for label, unit in current_units(store).items()}
        assert now == {**coded, "partial/0": plain["partial/0"]}


def test_damaged_codings_json_is_as_none(tmp_path: Path) -> None:
    store = publish_step(tmp_path, 0)
    assert encode_current(store, bases=1)
    (store.folder("v0") / "codings.json").write_bytes(b'{"units": 5}')
    assert "codings" not in json.loads(current_units(store)["shared"].manifest)
    assert encode_current(store, bases=1)
    check_codings(store, {"": None})


def test_a_damaged_unit_is_not_coded_and_a_damaged_base_not_used(tmp_path: Path) -> None:
    store = publish_step(tmp_path, 0)
    publish_step(tmp_path, 1)

    def damage(version: str) -> None:
        with (store.folder(version) / "group-0.safetensors").open("r+b") as file:
            file.seek(5000)
            file.write(b"\xff\x00\xff\x00")

    damage("v0")
    assert encode_current(store, bases=1)
    unit = current_units(store)["partial/0"]
    sizes = {coding["base"]: coding["size"] for coding in json.loads(unit.manifest)["codings"]}
    assert len(set(sizes.values())) == 1, "the one as a difference has values alone, too"
    shutil.rmtree(store.folder("v1") / "coded")
    (store.folder("v1") / "codings.json").unlink()
    damage("v1")
    with pytest.raises(Exception, match="not what was published"):
        encode_current(store, bases=1)


def test_one_encoder_at_a_time(tmp_path: Path) -> None:
    store = publish_step(tmp_path, 0)

    def other() -> bool:
        assert not encode_current(store, bases=1), "another is at it"
        return False

    assert encode_current(store, bases=1, stop=other)


def test_a_version_that_is_retired_meanwhile_ends_it(tmp_path: Path) -> None:
    store = publish_step(tmp_path, 0)

    def stop() -> bool:
        shutil.rmtree(store.folder("v0"), ignore_errors=True)
        return False

    assert not encode_current(store, bases=1, stop=stop)


def test_a_worker_takes_codings_in_while_it_serves(tmp_path: Path) -> None:
    """And does not take a copied store's files, which it has just verified, out of service again."""
    original = publish_step(tmp_path / "original", 0)
    shutil.copytree(original.path, tmp_path / "store", symlinks=True, copy_function=shutil.copyfile)
    store = Store(tmp_path / "store")
    cache = SnapshotCache(store.path)
    assert cache.refresh()
    for check in cache.verifiers:
        check.wait()
    assert not cache.damaged
    download = cache.current.units["partial/0"].payload if cache.current else None
    assert download is not None
    download.retain()
    assert encode_current(store, bases=1)
    assert cache.refresh()
    assert not cache.damaged
    assert cache.current is not None
    assert cache.current.units["partial/0"].codings
    assert download.intact()
    download.release()
    assert not cache.refresh()
    cache.close()


def test_closing_leaves_no_descriptor(tmp_path: Path) -> None:
    store = publish_step(tmp_path, 0)
    assert encode_current(store, bases=1)
    before = len(os.listdir("/proc/self/fd"))
    snapshot = open_snapshot(store.folder("v0"))
    assert len(os.listdir("/proc/self/fd")) == before + 6
    snapshot.release()
    assert len(os.listdir("/proc/self/fd")) == before


def test_versions_say_how_much_room_codings_take(tmp_path: Path) -> None:
    store = publish_step(tmp_path, 0)
    assert list_versions(store.path)[0]["coded"] == 0
    assert encode_current(store, bases=1)
    on_disk = sum(path.stat().st_size for path in (store.folder("v0") / "coded").iterdir())
    assert list_versions(store.path)[0]["coded"] == on_disk > 0


def test_codings_go_with_their_version(tmp_path: Path) -> None:
    store = publish_step(tmp_path, 0)
    assert encode_current(store, bases=1)
    publish(tmp_path / "in-0", store.path, block=1, version="next", experts=SPLIT, keep=1)
    assert sorted(os.listdir(store.snapshots)) == ["next"]
