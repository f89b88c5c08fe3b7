"""`pull` to files: complete or not there, resumed, unchanged parts kept, every refusal in a sentence."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from bzstream.chain.keys import Key
from bzstream.chain.proofs import NonceCache, verify_request
from bzstream.client import (
    BadSignature,
    Busy,
    ClientError,
    DiskError,
    FolderBusy,
    Forbidden,
    NotFound,
    Progress,
    ProtocolViolation,
    Stopped,
    Tuning,
    Unauthorized,
    Unreachable,
    UsageError,
)
from bzstream.client.address import UnitRef
from bzstream.client.journal import Journal
from bzstream.client.manifest import parse_manifest
from tests.client.conftest import QUICK, Puller, noise
from tests.client.node import HOTKEY, Node, Seen, Unit, ed25519_signer

VERIFY = ("sha256", "blake3", "none")


def final(tmp_path: Path, name: str = "group-0") -> Path:
    return tmp_path / "out" / f"{name}.safetensors"


class StopAfter:
    """A progress callback that interrupts, as Ctrl-C does, once so many bytes are there."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, moment: Progress) -> None:
        if moment.present >= self.count:
            raise KeyboardInterrupt


@pytest.mark.parametrize("verify", VERIFY)
@pytest.mark.parametrize("size", [1, 4096, 65536, 65537, 3_000_000])
def test_the_file_is_the_payload(verify: str, size: int, node: Node, tmp_path: Path, pull_quickly: Puller) -> None:
    node.units["partial", 0] = Unit(noise(size))
    report = pull_quickly(verify=verify)
    assert final(tmp_path).read_bytes() == noise(size)
    assert report.fetched == size
    assert os.listdir(tmp_path / "out") == ["group-0.safetensors"]


def test_all_units_of_a_call_come_over_the_same_connection(node: Node, tmp_path: Path, pull_quickly: Puller) -> None:
    node.units["shared", None] = Unit(noise(1_000_000, 2))
    node.units["full", None] = Unit(noise(2_000_000, 3))
    pull_quickly(shared=True, full=True, connections=1)
    assert final(tmp_path, "shared").read_bytes() == noise(1_000_000, 2)
    assert final(tmp_path, "model").read_bytes() == noise(2_000_000, 3)
    assert node.connections == 1


@pytest.mark.parametrize("verify", VERIFY)
def test_an_interrupted_pull_fetches_only_the_rest(
    verify: str, node: Node, payload: bytes, tmp_path: Path, pull_quickly: Puller
) -> None:
    node.rate = 2e6
    with pytest.raises(KeyboardInterrupt):
        pull_quickly(verify=verify, progress=StopAfter(1_000_000), connections=2)
    assert not final(tmp_path).exists()
    node.rate = 0
    report = pull_quickly(verify=verify, connections=1)
    assert final(tmp_path).read_bytes() == payload
    assert report.fetched <= len(payload) - 1_000_000


def test_chunks_that_only_claim_to_be_there_are_not_believed_after_a_reboot(
    node: Node, payload: bytes, tmp_path: Path, pull_quickly: Puller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power loss can keep the state file and lose the data; what is on the disk is hashed again."""
    node.rate = 2e6
    with pytest.raises(KeyboardInterrupt):
        pull_quickly(progress=StopAfter(1_500_000), connections=1)
    part = tmp_path / "out" / ".group-0.safetensors.part"
    with part.open("r+b") as stream:
        stream.write(bytes(100_000))  # the first two chunks never reached the disk
    monkeypatch.setattr("bzstream.client.journal.boot_id", lambda: b"another boot....")
    node.rate = 0
    report = pull_quickly()
    assert final(tmp_path).read_bytes() == payload
    assert 100_000 <= report.fetched < len(payload) - 1_000_000


def test_damage_to_the_part_file_is_healed_at_the_latest_by_the_whole_hash(
    node: Node, payload: bytes, tmp_path: Path, pull_quickly: Puller
) -> None:
    node.rate = 2e6
    with pytest.raises(KeyboardInterrupt):
        pull_quickly(progress=StopAfter(1_500_000), connections=1)
    with (tmp_path / "out" / ".group-0.safetensors.part").open("r+b") as stream:
        stream.write(b"damage")
    node.rate = 0
    with pytest.raises(ClientError, match="SHA-256"):
        pull_quickly()
    assert not final(tmp_path).exists()
    pull_quickly()
    assert final(tmp_path).read_bytes() == payload


@pytest.mark.parametrize("name", [".group-0.safetensors.state", ".group-0.safetensors.part"])
@pytest.mark.parametrize("content", [b"", b"junk" * 1000])
def test_foreign_files_in_the_place_of_ours_do_no_harm(
    name: str, content: bytes, payload: bytes, tmp_path: Path, pull_quickly: Puller
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(content)
    pull_quickly()
    assert final(tmp_path).read_bytes() == payload


def test_a_server_restart_in_the_middle_is_survived(
    node: Node, payload: bytes, tmp_path: Path, pull_quickly: Puller
) -> None:
    node.rate = 1e6

    def restart() -> None:
        while node.sent < 500_000:
            time.sleep(0.01)
        node.stop()
        node.start()

    helper = threading.Thread(target=restart)
    helper.start()
    report = pull_quickly(connections=4)
    helper.join()
    assert final(tmp_path).read_bytes() == payload
    assert report.fetched < len(payload) * 1.05


def test_the_second_pull_of_the_same_version_fetches_nothing(
    node: Node, payload: bytes, tmp_path: Path, pull_quickly: Puller
) -> None:
    pull_quickly()
    sent = node.sent
    report = pull_quickly()
    assert node.sent == sent
    assert report.fetched == 0
    assert report.units[0].reused == len(payload)


@pytest.mark.parametrize("verify", VERIFY)
def test_only_chunks_that_changed_cross_the_network(
    verify: str, node: Node, payload: bytes, tmp_path: Path, pull_quickly: Puller
) -> None:
    pull_quickly()
    changed = bytearray(payload)
    changed[70_000] ^= 1
    changed[-1] ^= 1
    # A whole chunk inserted: what follows moved, and is found where it is now.
    moved = bytes(changed[: 65536 * 4]) + noise(65536, 9) + bytes(changed[65536 * 4 :])
    node.units["partial", 0] = Unit(moved, "step_2")
    sent = node.sent
    report = pull_quickly(verify=verify, connections=1)
    assert final(tmp_path).read_bytes() == moved
    tail = len(moved) % 65536
    assert node.sent - sent == 65536 + 65536 + tail
    assert report.version == "step_2"


def test_an_unfinished_older_version_gives_what_it_has(
    node: Node, payload: bytes, tmp_path: Path, pull_quickly: Puller
) -> None:
    node.rate = 2e6
    with pytest.raises(KeyboardInterrupt):
        pull_quickly(progress=StopAfter(2_000_000), connections=2)
    node.rate = 0
    changed = payload[:10] + b"\0" + payload[11:]
    node.units["partial", 0] = Unit(changed, "step_2")
    report = pull_quickly()
    assert final(tmp_path).read_bytes() == changed
    assert report.fetched < len(payload) - 1_500_000


def test_a_version_that_changes_in_the_middle_is_noticed_and_said(
    node: Node, payload: bytes, tmp_path: Path, pull_quickly: Puller
) -> None:
    node.rate = 2e6
    said: list[str] = []
    newer = payload[:-5] + b"12345"

    def flip(moment: Progress) -> None:
        if moment.present > 1_000_000:
            node.units["partial", 0] = Unit(newer, "step_2")
            node.rate = 0

    report = pull_quickly(progress=flip, notify=said.append, connections=2)
    assert final(tmp_path).read_bytes() == newer
    assert report.version == "step_2"
    assert any("moved on to version step_2" in line for line in said)
    assert report.fetched < len(payload) * 1.2


def test_units_of_one_call_are_of_one_version(node: Node, payload: bytes, tmp_path: Path, pull_quickly: Puller) -> None:
    """The slice is of step_1 when it is fetched; the shared tensors are of step_2 already."""
    node.units["shared", None] = Unit(noise(100_000, 2), "step_2")
    newer = Unit(payload[:-1] + b"!", "step_2")

    def answer(seen: Seen) -> None:
        if seen.path.startswith("/model/shared"):
            node.units["partial", 0] = newer

    node.answer = answer
    report = pull_quickly(shared=True)
    assert {unit.version for unit in report.units} == {"step_2"}
    assert final(tmp_path).read_bytes() == newer.payload


def test_version_stays(node: Node, payload: bytes, tmp_path: Path, pull_quickly: Puller) -> None:
    pull_quickly(version="step_1")
    assert all(seen.query["version"] == ["step_1"] for seen in node.seen)
    with pytest.raises(NotFound, match="step_9"):
        pull_quickly(version="step_9")


def test_a_server_that_ignores_the_pinned_version_is_refused(node: Node, tmp_path: Path, pull_quickly: Puller) -> None:
    node.lie = "etag"
    with pytest.raises(ProtocolViolation, match="keeps changing"):
        pull_quickly(version="step_1")
    assert not final(tmp_path).exists()


def test_mirrors_share_the_work_and_stand_in_for_each_other(
    node: Node, payload: bytes, tmp_path: Path, pull_quickly: Puller
) -> None:
    node.rate = 1.5e6
    with Node({("partial", 0): Unit(payload)}, rate=1.5e6) as second, Node() as empty:
        gone = Node()
        gone.start()
        gone.stop()

        def stop_second() -> None:
            _until(lambda: second.sent > 300_000)
            second.stop()

        stopper = threading.Thread(target=stop_second)
        stopper.start()
        pull_quickly(url=[empty.url, gone.url, node.url, second.url], connections=6)
        stopper.join()
    assert final(tmp_path).read_bytes() == payload
    assert node.sent > 300_000
    assert second.sent > 300_000


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_mirror_with_another_version_is_left_out(
    node: Node, payload: bytes, tmp_path: Path, pull_quickly: Puller
) -> None:
    with Node({("partial", 0): Unit(noise(3_000_000, 7), "step_0")}) as behind:
        pull_quickly(url=[node.url, behind.url], connections=4)
    assert final(tmp_path).read_bytes() == payload


def test_a_slow_connection_loses_its_work_to_the_others(
    node: Node, payload: bytes, tmp_path: Path, pull_quickly: Puller
) -> None:
    """One connection stalls inside a chunk for ever; the rest of its chunk comes over another, long before stall_s."""
    node.lie, node.lies_left = "stall", 1
    began = time.monotonic()
    pull_quickly(tuning=Tuning(stall_s=30, stuck_s=0.3, min_steal=16384), connections=4)
    assert final(tmp_path).read_bytes() == payload
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(("status", "header"), [(503, "1"), (429, "1")])
def test_retry_after_is_honoured(
    status: int, header: str, node: Node, payload: bytes, tmp_path: Path, pull_quickly: Puller
) -> None:
    refused: list[float] = []
    served: list[float] = []

    def answer(seen: Seen) -> tuple[int, list[tuple[str, str]], bytes] | None:
        if seen.range is not None and not refused:
            refused.append(time.monotonic())
            return status, [("Retry-After", header)], b"{}"
        if seen.range is not None:
            served.append(time.monotonic())
        return None

    node.answer = answer
    pull_quickly(connections=1)
    assert final(tmp_path).read_bytes() == payload
    assert served[0] - refused[0] >= 1.0


def test_a_node_that_is_not_ready_is_waited_for(node: Node, payload: bytes, pull_quickly: Puller) -> None:
    answers = [(503, [("Retry-After", "1")], b'{"detail":"loading","code":"not_loaded"}')]
    node.answer = lambda seen: answers.pop() if answers else None
    pull_quickly()


def test_a_long_retry_after_is_reported(node: Node, pull_quickly: Puller) -> None:
    node.answer = lambda seen: (503, [("Retry-After", "86400")], b"{}")
    began = time.monotonic()
    with pytest.raises(Busy):
        pull_quickly()
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [(401, Unauthorized, "BZ_AUTH_TOKEN"), (403, Forbidden, "does not allow"), (404, NotFound, "does not have")],
)
@pytest.mark.parametrize("when", ["manifest", "data"])
def test_each_refusal_has_its_own_sentence(
    status: int, error: type[Exception], words: str, when: str, node: Node, tmp_path: Path, pull_quickly: Puller
) -> None:
    detail = b'{"detail":"because\\u001b[31m so","code":"x"}'
    node.answer = lambda seen: (status, [], detail) if (when == "data") == (seen.range is not None) else None
    with pytest.raises(error, match=words) as caught:
        pull_quickly()
    assert "\x1b" not in str(caught.value)
    assert "because" in str(caught.value)
    assert not final(tmp_path).exists()


def test_nobody_there_is_said_soon(pull_quickly: Puller) -> None:
    began = time.monotonic()
    with pytest.raises(Unreachable, match="cannot be reached"):
        pull_quickly(url="http://127.0.0.1:1")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "changes",
    [
        {"groups": []},
        {"hotkey": None},
        {"hotkey": "nobody"},
        {"url": []},
        {"version": "../up"},
        {"connections": 0},
        {"token": "two words"},
        {"groups": [-1]},
        {"hotkey": HOTKEY, "key": Key.from_seed(bytes(32))},
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, object], node: Node, pull_quickly: Puller) -> None:
    with pytest.raises(UsageError):
        pull_quickly(**changes)
    assert node.seen == []


@pytest.mark.parametrize(
    "url", ["ftp://x", "http://", "http://u:p@h", "http://h/?a", "http://h/#f", "x", "http://h:99999", "http://h/a b"]
)
def test_wrong_urls_are_named(url: str, pull_quickly: Puller) -> None:
    with pytest.raises(ClientError):
        pull_quickly(url=url)


def test_two_pulls_into_one_folder_exclude_each_other(tmp_path: Path, pull_quickly: Puller) -> None:
    (tmp_path / "out").mkdir()
    fd = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(FolderBusy, match="another pull"):
        pull_quickly()
    os.close(fd)
    pull_quickly()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)], capture_output=True)
    if made.returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_one_clear_sentence(node: Node, small_disk: Path, pull_quickly: Puller) -> None:
    with pytest.raises(DiskError, match="the disk is full"):
        pull_quickly(out=small_disk / "out")
    assert not (small_disk / "out" / "group-0.safetensors").exists()
    assert node.data_requests() == []


def test_a_folder_that_cannot_be_made_is_one_clear_sentence(tmp_path: Path, pull_quickly: Puller) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DiskError):
        pull_quickly(out=tmp_path / "file" / "out")


def test_the_manifest_must_be_signed_by_the_validator_named(
    node: Node, payload: bytes, tmp_path: Path, pull_quickly: Puller
) -> None:
    key, other = Key.from_seed(b"\1" * 32), Key.from_seed(b"\2" * 32)
    with pytest.raises(BadSignature, match="not signed"):
        pull_quickly(validator_hotkey=key.ss58_address)
    node.sign = ed25519_signer(other)
    with pytest.raises(BadSignature, match="signed by"):
        pull_quickly(validator_hotkey=key.ss58_address)
    node.sign = ed25519_signer(key)
    report = pull_quickly(validator_hotkey=key.ss58_address)
    assert report.units[0].signed_by == key.ss58_address
    node.sign = lambda fields: (key.ss58_address, ed25519_signer(other)(fields)[1])
    with pytest.raises(BadSignature, match="not by"):
        pull_quickly()


def header(headers: dict[str, str], name: str) -> str | None:
    return headers.get(name.lower())


def test_every_request_carries_a_fresh_proof(node: Node, payload: bytes, tmp_path: Path, pull_quickly: Puller) -> None:
    miner, validator = Key.from_seed(b"\3" * 32), Key.from_seed(b"\4" * 32)
    node.lie, node.lies_left = "reset", 2
    node.sign = ed25519_signer(validator)
    pull_quickly(hotkey=None, key=miner, validator_hotkey=validator.ss58_address, connections=3)
    nonces = NonceCache()
    assert len(node.seen) > 4
    for seen in node.seen:
        headers = seen.headers
        proof = verify_request(partial(header, headers), "GET", seen.target, validator.ss58_address, nonces)
        assert nonces.use(proof), "each is another"
        assert proof.hotkey == miner.ss58_address
        assert headers["x-hotkey"] == miner.ss58_address


def test_without_a_receiver_the_node_says_for_whom_proofs_are(node: Node, pull_quickly: Puller) -> None:
    miner, validator = Key.from_seed(b"\3" * 32), Key.from_seed(b"\4" * 32)
    with pytest.raises(UsageError, match="does not say whose node it is"):
        pull_quickly(hotkey=None, key=miner)
    node.hotkey = validator.ss58_address
    said: list[str] = []
    pull_quickly(hotkey=None, key=miner, notify=said.append)
    assert validator.ss58_address in said[0]
    assert {seen.headers["x-bittensor-receiver"] for seen in node.data_requests()} == {validator.ss58_address}


def test_each_of_several_validators_is_named_in_its_own_proofs(
    node: Node, payload: bytes, pull_quickly: Puller
) -> None:
    miner = Key.from_seed(b"\3" * 32)
    node.hotkey, node.rate = Key.from_seed(b"\4" * 32).ss58_address, 3e6
    with Node({("partial", 0): Unit(payload)}, rate=3e6, hotkey=Key.from_seed(b"\5" * 32).ss58_address) as second:
        pull_quickly(url=[node.url, second.url], hotkey=None, key=miner, connections=4)
        for one in (node, second):
            assert {seen.headers["x-bittensor-receiver"] for seen in one.data_requests()} == {one.hotkey}


def test_the_receiver_of_proofs_is_not_the_signer_of_manifests(node: Node, pull_quickly: Puller) -> None:
    miner, signer, receiver = (Key.from_seed(bytes([number]) * 32) for number in (3, 4, 5))
    node.sign = ed25519_signer(signer)
    pull_quickly(hotkey=None, key=miner, validator_hotkey=signer.ss58_address, receiver=receiver.ss58_address)
    assert {seen.headers["x-bittensor-receiver"] for seen in node.seen} == {receiver.ss58_address}
    with pytest.raises(UsageError, match="not a hotkey"):
        pull_quickly(hotkey=None, key=miner, receiver="nobody")


def test_a_resumed_pull_says_from_where(node: Node, pull_quickly: Puller) -> None:
    node.rate = 2e6
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        pull_quickly(progress=StopAfter(1_500_000), connections=1, notify=said.append)
    assert said == []
    node.rate = 0
    report = pull_quickly(notify=said.append)
    assert said[0].startswith("group 0: going on from ")
    assert f"with {report.fetched} of 3000000 bytes still to fetch" in said[0]


def test_a_dry_run_says_what_would_be_fetched_and_does_nothing(
    node: Node, payload: bytes, tmp_path: Path, pull_quickly: Puller
) -> None:
    assert pull_quickly(dry_run=True).fetched == len(payload)
    assert not (tmp_path / "out").exists()
    node.rate = 2e6
    with pytest.raises(KeyboardInterrupt):
        pull_quickly(progress=StopAfter(1_500_000), connections=1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    estimate = pull_quickly(dry_run=True).fetched
    assert estimate <= len(payload) - 1_500_000
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    node.rate = 0
    assert pull_quickly().fetched == estimate
    assert pull_quickly(dry_run=True).fetched == 0
    node.units["partial", 0] = Unit(payload[:10] + b"!" + payload[11:], "step_2")
    assert pull_quickly(dry_run=True).fetched == node.chunk_size


def test_a_speed_limit_is_kept(node: Node, payload: bytes, tmp_path: Path, pull_quickly: Puller) -> None:
    began = time.monotonic()
    pull_quickly(tuning=replace(QUICK, max_rate=2e6))
    assert time.monotonic() - began > 0.9 * len(payload) / 2e6
    assert final(tmp_path).read_bytes() == payload


def test_progress_only_rises_and_ends_complete(node: Node, payload: bytes, pull_quickly: Puller) -> None:
    node.rate = 3e6
    moments: list[Progress] = []
    pull_quickly(progress=moments.append, connections=2)
    assert [m.present for m in moments] == sorted(m.present for m in moments)
    assert [m.verified for m in moments] == sorted(m.verified for m in moments)
    assert moments[-1].stage == "saving"
    assert moments[-1].verified == moments[-1].hashed == len(payload)
    assert any(m.rate > 0 and m.seconds_left and m.connections for m in moments)


def test_a_stop_from_another_thread_ends_the_call_at_once(node: Node, tmp_path: Path, pull_quickly: Puller) -> None:
    node.lie = "stall"
    opened: list[object] = []
    timer = threading.Timer(0.3, lambda: opened[0].stop())  # type: ignore[attr-defined]
    timer.start()
    began = time.monotonic()
    with pytest.raises(Stopped):
        pull_quickly(on_open=opened.append, tuning=Tuning(stall_s=60))
    assert time.monotonic() - began < 2
    assert not [t for t in threading.enumerate() if t.name.startswith("bzstream-")]


def test_no_thread_and_no_descriptor_is_left_behind(node: Node, pull_quickly: Puller) -> None:
    pull_quickly()
    before = len(os.listdir("/proc/self/fd"))
    for lie in ("flip", "", "reset", "200"):
        node.lie = lie
        try:
            pull_quickly()
        except ClientError:
            pass
    # The node's own ends close a moment later.
    _until(lambda: len(os.listdir("/proc/self/fd")) <= before + 2)
    assert not [t for t in threading.enumerate() if t.name.startswith("bzstream-")]


def test_a_state_file_of_another_manifest_is_not_used(node: Node, tmp_path: Path) -> None:
    want = UnitRef("partial", 0)
    manifest = parse_manifest(json.dumps(node.manifest(("partial", 0))).encode(), want)
    (tmp_path / "part").write_bytes(b"x")
    stat = (tmp_path / "part").stat()
    journal = Journal.create(tmp_path / "state", manifest, stat, hashed=True)
    journal.close()
    node.units["partial", 0] = Unit(noise(3_000_000, 5))
    other = parse_manifest(json.dumps(node.manifest(("partial", 0))).encode(), want)
    assert Journal.open(tmp_path / "state", other, stat, hashed=True) is None
    found = Journal.open(tmp_path / "state", manifest, stat, hashed=True)
    assert found is not None
    assert found[1]
    found[0].close()


def test_a_journal_remembers_ranges_until_their_chunk_is_judged(node: Node, tmp_path: Path) -> None:
    manifest = parse_manifest(json.dumps(node.manifest(("partial", 0))).encode(), UnitRef("partial", 0))
    (tmp_path / "part").write_bytes(b"x")
    stat = (tmp_path / "part").stat()
    journal = Journal.create(tmp_path / "state", manifest, stat, hashed=True)
    slot = journal.note(None, 10, 20)
    assert journal.note(slot, 10, 30) == slot
    journal.note(None, 65536, 65600)
    journal.close()
    found = Journal.open(tmp_path / "state", manifest, stat, hashed=True)
    assert found is not None
    journal = found[0]
    assert journal.received() == [(10, 30), (65536, 65600)]
    journal.mark_checked(0, good=True)
    assert journal.received() == [(65536, 65600)]
    assert journal.done[0] == 1
    journal.close()
    unhashed = Journal.create(tmp_path / "state", manifest, stat, hashed=False)
    unhashed.close()
    found = Journal.open(tmp_path / "state", manifest, stat, hashed=True)
    assert found is not None
    assert not found[1], "chunks that were never hashed are not trusted by a pull that hashes"
    found[0].close()
