"""Chunks that come coded: fewer bytes on the link, the same file; and everything that can be wrong with them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from blake3 import blake3

from bzstream.client import Progress, PullReport, Stopped, Tuning, fetch_tensors, pull
from bzstream.client.coded import CodedChunks
from bzstream.client.fetch_plan import FetchPlan, Segment
from bzstream.client.manifest import Manifest, parse_manifest
from bzstream.client.session import Session
from bzstream.client.session_factory import unit_refs
from bzstream.model import publish
from bzstream.model.codings import Codings, read_codings, write_codings
from bzstream.model.encode_units import encode_current
from bzstream.model.store import Store
from tests.model.build import Spec, fused, write_checkpoint
from tests.nodes import TOKEN, Node, running_node

SPECS: dict[str, Spec] = fused(experts=4, hidden=1024, inner=768)
"""Two groups, of 18 MiB and three chunks each."""
AT_ONCE = Tuning(coded_after_s=0.0)


def weights(step: int) -> dict[str, bytes]:
    found = {}
    for name, (_, shape) in SPECS.items():
        generator = np.random.default_rng([*name.encode()])
        values = generator.standard_normal(shape, np.float32) * np.float32(0.02)
        values += step * 2e-4 * generator.standard_normal(shape, np.float32)
        found[name] = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store: v0 and v1, both coded."""
    folder = tmp_path_factory.mktemp("coded")
    for step in (0, 1):
        write_checkpoint(folder / "in", SPECS, weights(step))
        publish(folder / "in", folder / "store", block=step, version=f"v{step}", groups=2)
        assert encode_current(Store(folder / "store"), bases=1)
    return folder


@pytest.fixture(scope="module")
def node(made: Path) -> Iterator[Node]:
    with running_node(made) as running:
        yield running


def fetch(
    node: Node, out: Path, *, version: str = "v1", urls: tuple[str, ...] = (), tuning: Tuning = AT_ONCE, **more: object
) -> PullReport:
    arguments = {"groups": [0], "hotkey": node.hotkey, "token": TOKEN, "tuning": tuning, "version": version, **more}
    return pull([node.url, *urls], out=out, **arguments)  # type: ignore[arg-type]


def unit_file(store: Path, version: str = "v1", name: str = "group-0") -> bytes:
    return (store / "snapshots" / version / f"{name}.safetensors").read_bytes()


def coding_sizes(store: Path, version: str = "v1") -> dict[bool, int]:
    """Is it a difference -> bytes of group 0's coded file."""
    codings = read_codings(store / "snapshots" / version)
    assert codings is not None
    return {coding.base is not None: coding.size for coding in codings.units["partial/0"].codings}


def test_a_first_pull_takes_two_thirds_and_the_next_a_third(node: Node, tmp_path: Path) -> None:
    moments: list[Progress] = []
    first = fetch(node, tmp_path, version="v0", progress=moments.append).units[0]
    assert (tmp_path / "group-0.safetensors").read_bytes() == unit_file(node.store, "v0")
    assert first.fetched == coding_sizes(node.store, "v0")[False] < 0.68 * first.size
    assert (first.gained, first.reused, first.chunks_fetched_again) == (first.size - first.fetched, 0, 0)
    assert moments[-1].gained == first.gained
    second = fetch(node, tmp_path).units[0]
    assert (tmp_path / "group-0.safetensors").read_bytes() == unit_file(node.store)
    assert second.fetched == coding_sizes(node.store)[True] < 0.45 * second.size
    assert second.gained == second.size - second.fetched
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_differences_alone(made: Path, tmp_path: Path) -> None:
    store = changed_store(made, tmp_path, keep_alone=False)
    with running_node(store.parent) as node:
        fetch(node, tmp_path / "out", version="v0", coding="off")
        report = fetch(node, tmp_path / "out").units[0]
        assert (tmp_path / "out" / "group-0.safetensors").read_bytes() == unit_file(store)
        assert report.fetched == coding_sizes(store)[True]


def test_off_and_fast_links_take_it_as_it_is(node: Node, tmp_path: Path) -> None:
    for number, more in enumerate(({"coding": "off"}, {"tuning": Tuning(coded_after_s=3600.0)})):
        report = fetch(node, tmp_path / str(number), **more).units[0]  # type: ignore[arg-type]
        assert (report.fetched, report.gained) == (report.size, 0)


@pytest.mark.parametrize("verify", ["sha256", "blake3", "none"])
def test_every_way_of_verifying(node: Node, tmp_path: Path, verify: str) -> None:
    report = fetch(node, tmp_path, verify=verify).units[0]
    assert report.gained > 0
    assert (tmp_path / "group-0.safetensors").read_bytes() == unit_file(node.store)


def test_tensors_in_memory(node: Node) -> None:
    moments: list[Progress] = []
    tensors = fetch_tensors(
        node.url,
        group=0,
        hotkey=node.hotkey,
        token=TOKEN,
        tuning=Tuning(coded_after_s=0.0, tick_s=0.001),
        connections=1,  # three chunks one after the other: there is a moment between the first and the last
        progress=moments.append,
        framework="numpy",
    )
    assert max(moment.gained for moment in moments) > 0
    assert sum(tensor.nbytes for tensor in tensors.values()) == len(unit_file(node.store)) - 4096


def test_an_interrupted_pull_goes_on(node: Node, tmp_path: Path) -> None:
    opened: list[Session] = []

    def progress(moment: Progress) -> None:
        if moment.verified:
            opened[0].stop()

    slow = Tuning(coded_after_s=0.0, tick_s=0.001)
    with pytest.raises(Stopped):
        fetch(node, tmp_path, tuning=slow, connections=1, progress=progress, on_open=opened.append)
    report = fetch(node, tmp_path).units[0]
    assert report.reused >= 8 << 20
    assert (tmp_path / "group-0.safetensors").read_bytes() == unit_file(node.store)


# What can be wrong with coded bytes


def changed_store(made: Path, folder: Path, *, keep_alone: bool = True, damage: str = "") -> Path:
    """A copy of the store. `damage`: to the "bytes" of every coded chunk, or to its "form", with hashes that fit."""
    store = folder / "changed" / "store"
    shutil.copytree(made / "store", store, symlinks=True)
    for version in ("v0", "v1"):
        at = store / "snapshots" / version
        codings = read_codings(at)
        assert codings is not None
        units = {}
        for label, unit in codings.units.items():
            kept = tuple(coding for coding in unit.codings if keep_alone or coding.base is not None)
            replaced = []
            for coding in kept:
                if damage:
                    file = at / "coded" / coding.file
                    content = bytearray(file.read_bytes())
                    for offset, length, _ in coding.chunks:
                        content[offset + length // 2 : offset + length // 2 + 8] = b"\xff\x00" * 4
                    file.write_bytes(content)
                    if damage == "form":
                        chunks = tuple((o, n, blake3(content[o : o + n]).hexdigest()) for o, n, _ in coding.chunks)
                        coding = msgspec.structs.replace(coding, chunks=chunks)
                replaced.append(coding)
            units[label] = msgspec.structs.replace(unit, codings=tuple(replaced))
        write_codings(at, Codings(codings.hotkey, units))
    return store


@pytest.mark.parametrize(
    ("damage", "said"), [("bytes", "sent coded bytes with a wrong hash"), ("form", "damaged where it was made")]
)
def test_wrong_coded_bytes_cost_little_and_the_unit_comes_as_it_is(
    made: Path, tmp_path: Path, damage: str, said: str
) -> None:
    store = changed_store(made, tmp_path, damage=damage)
    notices: list[str] = []
    with running_node(store.parent) as node:
        report = fetch(node, tmp_path / "out", connections=2, notify=notices.append).units[0]
        assert (tmp_path / "out" / "group-0.safetensors").read_bytes() == unit_file(store)
        assert report.gained == 0
        assert report.fetched <= report.size + 2 * coding_sizes(store)[False]
        assert any(said in notice for notice in notices)


def test_a_mirror_without_codings_or_with_others_sends_the_unit_as_it_is(
    made: Path, node: Node, tmp_path: Path
) -> None:
    """Its manifest is not read, and its coded bytes are not the ones that the first mirror's manifest describes."""
    store = changed_store(made, tmp_path, damage="form")
    with running_node(store.parent) as other:
        notices: list[str] = []
        report = fetch(node, tmp_path / "out", urls=(other.url,), connections=4, notify=notices.append).units[0]
        assert (tmp_path / "out" / "group-0.safetensors").read_bytes() == unit_file(node.store)
        assert report.chunks_fetched_again == 0
        assert notices == []


def test_a_coded_file_that_is_cut_while_it_is_served(made: Path, tmp_path: Path) -> None:
    store = changed_store(made, tmp_path)
    with running_node(store.parent) as node:
        for file in (store / "snapshots" / "v1" / "coded").glob("group-0*planes-1"):
            os.truncate(file, 1000)
        report = fetch(node, tmp_path / "out").units[0]
        assert (tmp_path / "out" / "group-0.safetensors").read_bytes() == unit_file(store)
        assert report.gained == 0


def test_an_older_file_that_is_no_base_is_not_used_as_one(node: Node, tmp_path: Path) -> None:
    fetch(node, tmp_path, version="v0")
    file = tmp_path / "group-0.safetensors"
    content = bytearray(file.read_bytes())
    content[5000:5004] = b"\x00\x01\x02\x03"
    file.write_bytes(content)
    report = fetch(node, tmp_path).units[0]
    assert file.read_bytes() == unit_file(node.store)
    difference = next(coding for coding in manifest_of(node).codings if coding.base is not None)
    hoped = max(length for _, length, _ in difference.chunks)  # one chunk, while the older file was being hashed
    assert report.gained == report.size - coding_sizes(node.store)[False]
    assert coding_sizes(node.store)[False] <= report.fetched <= coding_sizes(node.store)[False] + hoped
    assert report.chunks_fetched_again == 0


# The decision


def manifest_of(node: Node) -> Manifest:
    raw = node.get("/model/partial/manifest", node.headers(0)).body
    return parse_manifest(raw, unit_refs([0], shared=False, full=False)[0])


class Base:
    """An older file that is known at once."""

    def __init__(self, content: bytes) -> None:
        self.content, self.size = content, len(content)

    def sha256(self, stopped: threading.Event) -> bytes | None:
        return hashlib.sha256(self.content).digest()

    def read_at(self, offset: int, view: memoryview) -> bool:
        view[:] = self.content[offset : offset + len(view)]
        return True


def test_a_difference_is_taken_where_it_is_shorter(node: Node) -> None:
    manifest = manifest_of(node)
    alone = next(coding for coding in manifest.codings if coding.base is None)
    difference = next(coding for coding in manifest.codings if coding.base is not None)
    coded = CodedChunks(manifest, AT_ONCE, far=False, base=Base(unit_file(node.store, "v0")))
    coded.close()
    assert coded.choose(1, 0) is difference
    assert coded.share == difference.size / manifest.size
    other = CodedChunks(manifest, AT_ONCE, far=False, base=Base(b"something else"))
    other.close()
    assert other.choose(1, 0) is alone
    assert other.share == alone.size / manifest.size


def decided(coded: CodedChunks, rates: Sequence[float], *, began: float = 0.0, step: float = 0.1) -> list[bool]:
    """Whether chunks are to be fetched coded after each `step` seconds, with their rates in bytes a second."""
    fetched, found = 1, []
    coded.update(fetched, began)
    for number, rate in enumerate(rates, 1):
        fetched += int(rate * step)
        coded.update(fetched, began + number * step)
        found.append(coded.active)
    return found


def test_a_slow_link_takes_coded_chunks_when_it_has_been_measured(node: Node) -> None:
    coded = CodedChunks(manifest_of(node), Tuning(), far=False, cores=2)
    found = decided(coded, [12.5e6] * 20)
    assert not any(found[:4]), "half a second is not over"
    assert all(found[6:])
    assert coded.choose(0, 0) is not None
    assert CodedChunks(manifest_of(node), Tuning(), far=True, cores=2).active, "a far link is seldom fast"


@pytest.mark.parametrize(
    "rates",
    [
        [2e6, 10e6, 30e6, *[300e6] * 30],  # connections that open slowly, on a busy machine
        [0, 0, 300e6, 0, 0, 0] * 6,  # a machine that gives the two ends their turns seldom
        [90e6] * 40,
    ],
)
def test_a_fast_link_never_does(node: Node, rates: list[float]) -> None:
    coded = CodedChunks(manifest_of(node), Tuning(), far=False, cores=2)
    assert not any(decided(coded, rates))


def test_between_the_two_it_stays_as_it_is(node: Node) -> None:
    """90 MB/s uncoded is too much to begin, the same link's coded bytes are not too much to go on."""
    coded = CodedChunks(manifest_of(node), Tuning(), far=False, cores=2)
    assert decided(coded, [12.5e6] * 20)[-1]
    assert all(decided(coded, [90e6] * 20, began=10.0))
    assert not decided(coded, [900e6] * 20, began=20.0)[-1]


def test_as_long_as_nothing_is_decided_runs_are_as_long_as_without_codings(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goals: list[int] = []
    take = FetchPlan.take

    def noted(plan: FetchPlan, worker: int, goal: int, now: float) -> Segment | None:
        goals.append(goal)
        return take(plan, worker, goal, now)

    monkeypatch.setattr(FetchPlan, "take", noted)
    found = {}
    for coding in ("off", "auto"):
        goals.clear()
        report = fetch(node, tmp_path / coding, connections=1, coding=coding, tuning=Tuning(coded_after_s=3600.0))
        assert report.units[0].gained == 0
        found[coding] = sorted(goals, reverse=True)[:2]
    assert found["auto"] == found["off"]
    assert min(found["auto"]) >= 8 << 20


def test_codings_that_are_not_known_are_passed_over(node: Node) -> None:
    raw = json.loads(node.get("/model/partial/manifest", node.headers(0)).body)
    for coding in raw["codings"]:
        coding["name"] = "later-7"
    manifest = parse_manifest(json.dumps(raw).encode(), unit_refs([0], shared=False, full=False)[0])
    coded = CodedChunks(manifest, AT_ONCE, far=True)
    assert (coded.active, coded.choose(0, 0), coded.share) == (False, None, 1.0)
