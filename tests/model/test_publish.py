"""Publishing end to end: every unit bit for bit, what is linked, what is kept, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bzstream.model import SnapshotCache, publish
from bzstream.model.errors import (
    VersionExists,
)
from bzstream.model.plan import make_plan
from bzstream.model.write_units import buffers_of
from bzstream.util.dtypes import DTYPES
from tests.seeds import seeds

from .build import SPLIT, Signer, Spec, check_store, fused, separate, tree, write_checkpoint


@pytest.mark.parametrize("shards", [0, 3])
@pytest.mark.parametrize(
    "specs",
    [fused(), fused(biases=True), separate(), separate(block="block_sparse_moe"), fused(dtype="F32")],
    ids=["fused", "fused with biases", "separate", "mixtral", "float32"],
)
def test_every_layout(tmp_path: Path, specs: dict[str, Spec], shards: int) -> None:
    data = write_checkpoint(tmp_path / "in", specs, shards=shards)
    publish(tmp_path / "in", tmp_path / "store", block=1, version="a", groups=2)
    check_store(tmp_path / "store", specs, data, SPLIT)


dtypes = st.sampled_from(["BF16", "F32", "F8_E4M3", "U8", "F64"])


@st.composite
def models(draw: st.DrawFn) -> tuple[dict[str, Spec], dict[int, dict[int, tuple[int, ...]]]]:
    """Any mix of layouts, odd sizes and dtypes, different numbers of experts, and any map over them."""
    specs: dict[str, Spec] = {}
    counts: dict[int, int] = {}
    for layer in draw(st.lists(st.integers(0, 20), min_size=1, max_size=3, unique=True)):
        counts[layer] = draw(st.integers(1, 6))
        at = f"model.layers.{layer}.mlp.experts"
        for part in ["gate_up_proj", "down_proj", "down_proj_bias"][: draw(st.integers(1, 3))]:
            dtype, shape = draw(dtypes), tuple(draw(st.lists(st.integers(0, 5), max_size=2)))
            if draw(st.booleans()) if part == "gate_up_proj" else f"{at}.gate_up_proj" in specs:
                specs[f"{at}.{part}"] = dtype, (counts[layer], *shape)
            else:
                specs |= {f"{at}.{expert}.{part}.weight": (dtype, shape) for expert in range(counts[layer])}
    for number in range(draw(st.integers(0, 4))):
        specs[f"model.other.{number}"] = draw(dtypes), tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    specs["model.norm.weight"] = "F32", (3,)
    groups = draw(st.lists(st.integers(0, 999), min_size=1, max_size=4, unique=True))
    experts = {
        group: {
            layer: tuple(draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=count, unique=True)))
            for layer, count in counts.items()
        }
        for group in groups
    }
    return specs, experts


@settings(max_examples=seeds(15, 60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(models(), st.integers(0, 3), st.sampled_from([17, 4096, 1 << 21]))
def test_any_model_and_map_give_exact_units(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    model: tuple[dict[str, Spec], dict[int, dict[int, tuple[int, ...]]]],
    shards: int,
    buffer: int,
) -> None:
    specs, experts = model
    place = tmp_path_factory.mktemp("any")
    monkeypatch.setattr("bzstream.model.write_units.BUFFER_SIZE", buffer)
    data = write_checkpoint(place / "in", specs, shards=shards)
    report = publish(place / "in", place / "store", block=1, version="a", experts=experts)
    check_store(place / "store", specs, data, experts)
    assert report.bytes_source == sum(map(len, data.values()))
    # The same once more: everything is linked, whichever order the units were filled in.
    report = publish(place / "in", place / "store", block=2, version="b", experts=experts)
    assert report.bytes_written == 0
    check_store(place / "store", specs, data, experts)


@settings(max_examples=seeds(10, 40), deadline=None)
@given(models(), st.sampled_from([1, 3, 64, 1000]))
def test_a_plan_covers_every_byte_once(
    model: tuple[dict[str, Spec], dict[int, dict[int, tuple[int, ...]]]], size: int
) -> None:
    from bzstream.model.checkpoint import Place
    from bzstream.model.naming import TensorInfo, find_layers
    from bzstream.tensorfile import tensor_bytes

    specs, experts = model
    tensors = {name: TensorInfo(name, *spec, tensor_bytes(*spec)) for name, spec in specs.items()}
    places, end = {}, 0
    for name, tensor in tensors.items():
        places[name] = Place(0, end)
        end += tensor.size
    plan = make_plan(tensors, places, find_layers(tensors.values()), experts)
    source = [0] * end
    filled = [[0] * unit.size for unit in plan.units]
    for run in plan.runs:
        assert run.length > 0
        assert run.targets
        for at in range(run.offset, run.offset + run.length):
            source[at] += 1
        for unit, offset in run.targets:
            for at in range(offset, offset + run.length):
                filled[unit][at] += 1
    assert set(source) <= {1}
    for item, covered in zip(plan.units, filled, strict=True):
        assert set(covered[: len(item.head)]) == {0}
        assert set(covered[len(item.head) :]) <= {1}
    assert len(plan.head) + sum(length for _, _, length in plan.extents()) == plan.size
    cut = list(buffers_of(plan, size))
    assert all(sum(part.length for part in parts) == size for parts in cut[:-1])
    assert sum(part.length for parts in cut for part in parts) == plan.size


def test_experts_of_no_group_and_of_two_groups(tmp_path: Path) -> None:
    specs = fused(layers=1, experts=6)
    data = write_checkpoint(tmp_path / "in", specs)
    experts = {3: {0: (5, 0)}, 1: {0: (0, 2)}}
    report = publish(tmp_path / "in", tmp_path / "store", block=1, version="a", experts=experts)
    check_store(tmp_path / "store", specs, data, experts)
    row = sum(len(data[name]) // 6 for name in data if ".experts." in name)
    assert report.bytes_repeated == row
    rest = tmp_path / "store/current/ungrouped.safetensors"
    with safetensors.safe_open(rest, "pt") as file:
        assert json.loads(file.metadata()["experts"]) == {"0": [1, 3, 4]}
        assert file.metadata().keys() == {"format", "experts"}
    cache = SnapshotCache(tmp_path / "store")
    cache.refresh()
    assert cache.current is not None
    assert set(cache.current.units) == {"shared", "partial/1", "partial/3", "ungrouped", "full"}
    cache.close()


def test_unit_files_say_what_they_hold_and_nothing_of_the_version(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", fused())
    publish(tmp_path / "in", tmp_path / "store", block=77, version="a-version", groups=2)
    with safetensors.safe_open(tmp_path / "store/current/group-1.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "expert_group": "1", "experts": '{"0":[2,3],"1":[2,3]}'}
    with safetensors.safe_open(tmp_path / "store/current/shared.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_envelope_and_manifest_are_the_contracts_bytes(tmp_path: Path) -> None:
    specs = fused()
    write_checkpoint(tmp_path / "in", specs)
    publish(tmp_path / "in", tmp_path / "store", block=12345, version="step_1000", groups=2)
    cache = SnapshotCache(tmp_path / "store")
    cache.refresh()
    assert cache.current is not None
    unit = cache.current.partial(0)
    assert unit is not None
    raw = unit.payload.read()
    digest = hashlib.sha256(raw).hexdigest()
    text = f'{{"expert_group":0,"block_number":12345,"model_version":"step_1000","content_hash":"sha256:{digest}"}}'
    assert unit.envelope == struct.pack("<Q", 4088) + text.encode().ljust(4088)
    assert unit.enveloped.read() == unit.envelope + raw
    assert unit.etag == f'"{digest}"'
    assert unit.etag_enveloped[0] == unit.etag_enveloped[-1] == '"'
    assert list(json.loads(unit.manifest)) == [
        "unit", "expert_group", "block_number", "model_version", "content_hash", "payload_offset", "size",
        "chunk_size", "chunk_hash", "chunks", "validator_hotkey", "signature",
    ]  # fmt: skip
    assert json.loads(unit.manifest) == {
        "unit": "partial", "expert_group": 0, "block_number": 12345, "model_version": "step_1000",
        "content_hash": f"sha256:{digest}", "payload_offset": 4096, "size": len(raw), "chunk_size": 8388608,
        "chunk_hash": "blake3", "chunks": list(unit.chunks), "validator_hotkey": None, "signature": None,
    }  # fmt: skip
    shared, full = cache.current.shared, cache.current.full
    assert b'{"expert_group":null,' in shared.envelope
    assert (full.envelope, full.etag) == (b"", full.etag_enveloped)
    assert json.loads(full.manifest)["payload_offset"] == 0
    assert (json.loads(shared.manifest)["unit"], json.loads(full.manifest)["unit"]) == ("shared", "full")
    assert len({u.etag for u in (unit, shared, full)} | {unit.etag_enveloped, shared.etag_enveloped}) == 5
    cache.close()
    publish(tmp_path / "in", tmp_path / "store", block=12346, version="step_1001", groups=2)
    cache.refresh()
    assert cache.current is not None
    again = cache.current.partial(0)
    assert again is not None
    assert (again.etag == unit.etag, again.etag_enveloped == unit.etag_enveloped) == (True, False)
    cache.close()


def test_manifests_are_signed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", fused(experts=4))
    signer = Signer()
    experts = {0: {0: (1,), 1: (1,)}}
    publish(tmp_path / "in", tmp_path / "store", block=1, version="a", experts=experts, signer=signer)
    cache = SnapshotCache(tmp_path / "store")
    cache.refresh()
    assert cache.current is not None
    for unit in cache.current.units.values():
        manifest = json.loads(unit.manifest)
        assert manifest.pop("signature") == f"signature of {unit.kind}"
        assert manifest["validator_hotkey"] == "5Hotkey"
        assert manifest in signer.signed
    assert [fields["unit"] for fields in signer.signed] == ["shared", "partial", "ungrouped", "full"]
    cache.close()


def test_modes_are_the_contracts_whatever_the_umask(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", fused())
    old = os.umask(0o077)
    try:
        publish(tmp_path / "in", tmp_path / "deep" / "store", block=1, version="a", groups=2)
    finally:
        os.umask(old)
    for path in (tmp_path / "deep" / "store").rglob("*"):
        mode = stat.S_IMODE(os.stat(path).st_mode)
        if path.name != ".lock":
            assert mode == (0o755 if path.is_dir() else 0o644), path
    assert os.readlink(tmp_path / "deep/store/current") == "snapshots/a"


def test_only_what_changed_is_written(tmp_path: Path) -> None:
    specs = fused(experts=6)
    data = write_checkpoint(tmp_path / "in", specs)
    store = tmp_path / "store"
    publish(tmp_path / "in", store, block=1, version="a", groups=3)
    name = "model.language_model.layers.1.mlp.experts.down_proj"
    changed = bytearray(data[name])
    changed[-1] ^= 1  # the last byte of the last expert of the last tensor of group 2
    data = write_checkpoint(tmp_path / "in", specs, {**data, name: bytes(changed)})
    report = publish(tmp_path / "in", store, block=2, version="b", groups=3, dry_run=True)
    assert {unit.unit for unit in report.units if unit.file and not unit.linked} == {"partial/2"}
    report = publish(tmp_path / "in", store, block=2, version="b", groups=3)
    assert {unit.unit for unit in report.units if unit.file and not unit.linked} == {"partial/2"}
    sizes = {unit.unit: unit.size for unit in report.units}
    assert report.bytes_written == sizes["partial/2"]
    assert report.bytes_linked == sizes["shared"] + sizes["partial/0"] + sizes["partial/1"]
    split = {g: dict.fromkeys((0, 1), (2 * g, 2 * g + 1)) for g in range(3)}
    check_store(store, specs, data, split)
    for file in ("shared", "group-0", "group-1"):
        old, new = store / f"snapshots/a/{file}.safetensors", store / f"snapshots/b/{file}.safetensors"
        assert os.stat(old).st_ino == os.stat(new).st_ino
    assert os.stat(store / "snapshots/a/group-2.safetensors").st_nlink == 1


@settings(max_examples=seeds(10, 40), deadline=None)
@given(st.data())
def test_any_change_gives_exact_units_again(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """One byte of the source differs, anywhere: files compared so far are completed from the old ones."""
    specs, experts = data.draw(models())
    place = tmp_path_factory.mktemp("change")
    old = write_checkpoint(place / "in", specs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bzstream.model.write_units.BUFFER_SIZE", data.draw(st.sampled_from([29, 1 << 20])))
        publish(place / "in", place / "store", block=1, version="a", experts=experts)
        name = data.draw(st.sampled_from([name for name, content in old.items() if content]))
        changed = bytearray(old[name])
        changed[data.draw(st.integers(0, len(changed) - 1))] ^= 0x40
        new = write_checkpoint(place / "in", specs, {**old, name: bytes(changed)})
        report = publish(place / "in", place / "store", block=2, version="b", experts=experts)
    check_store(place / "store", specs, new, experts)
    assert 0 < sum(1 for unit in report.units if unit.file and not unit.linked) <= len(experts)


def test_a_file_damaged_on_disk_is_written_anew_not_linked(tmp_path: Path) -> None:
    specs = fused()
    data = write_checkpoint(tmp_path / "in", specs)
    store = tmp_path / "store"
    publish(tmp_path / "in", store, block=1, version="a", groups=2)
    with (store / "current/group-0.safetensors").open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\x55")
    report = publish(tmp_path / "in", store, block=2, version="b", groups=2)
    assert {unit.unit for unit in report.units if unit.file and not unit.linked} == {"partial/0"}
    check_store(store, specs, data, SPLIT)


def test_a_file_that_cannot_be_linked_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(31, "Too many links")

    specs = fused()
    data = write_checkpoint(tmp_path / "in", specs)
    publish(tmp_path / "in", tmp_path / "store", block=1, version="a", groups=2)
    monkeypatch.setattr("os.link", refuse)
    report = publish(tmp_path / "in", tmp_path / "store", block=2, version="b", groups=2)
    assert report.bytes_linked == 0
    check_store(tmp_path / "store", specs, data, SPLIT)


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", fused())
    store = tmp_path / "store"
    for number, version in enumerate(["z", "b", "y", "a", "x"]):
        report = publish(tmp_path / "in", store, block=number, version=version, groups=2)
    assert report.retired == ("b",)
    assert sorted(os.listdir(store / "snapshots")) == ["a", "x", "y"]
    report = publish(tmp_path / "in", store, block=9, version="one", groups=2, keep=1)
    assert report.retired == ("a", "x", "y")
    assert os.listdir(store / "snapshots") == ["one"]


def test_a_dry_run_touches_nothing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", fused())
    store = tmp_path / "store"
    report = publish(tmp_path / "in", store, block=1, version="a", groups=2, dry_run=True)
    assert not store.exists()
    assert report.bytes_linked == 0
    assert report.bytes_written == sum(unit.size for unit in report.units if unit.file)
    real = publish(tmp_path / "in", store, block=1, version="a", groups=2)
    assert (real.bytes_written, [u.size for u in real.units]) == (report.bytes_written, [u.size for u in report.units])
    before = tree(store)
    report = publish(tmp_path / "in", store, block=2, version="b", groups=2, dry_run=True)
    assert (report.bytes_written, report.bytes_linked) == (0, real.bytes_written)
    assert tree(store) == before
    with pytest.raises(VersionExists):
        publish(tmp_path / "in", store, block=2, version="a", groups=2, dry_run=True)


def test_progress_goes_from_nothing_to_everything(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", fused())
    seen: list[tuple[int, int]] = []
    report = publish(
        tmp_path / "in", tmp_path / "store", block=1, version="a", groups=2, progress=lambda *at: seen.append(at)
    )
    full = report.units[-1].size
    assert seen[-1] == (full, full)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_full_view_loads_with_the_stock_library(tmp_path: Path) -> None:
    specs = fused(dtype="F32")
    data = write_checkpoint(tmp_path / "in", specs)
    publish(tmp_path / "in", tmp_path / "store", block=1, version="a", experts={5: {0: (3, 1), 1: (0, 2)}})
    cache = SnapshotCache(tmp_path / "store")
    cache.refresh()
    assert cache.current is not None
    path = tmp_path / "model.safetensors"
    path.write_bytes(cache.current.full.payload.read())
    cache.close()
    with safetensors.safe_open(path, "pt") as file:
        assert set(file.keys()) == set(specs)
        for name, (_, shape) in specs.items():
            wanted = torch.frombuffer(bytearray(data[name]), dtype=torch.float32).reshape(shape)
            assert torch.equal(file.get_tensor(name).view(torch.int32), wanted.view(torch.int32))


def test_every_dtype_of_the_format_is_published(tmp_path: Path) -> None:
    specs: dict[str, Spec] = {f"model.other.{dtype}": (dtype, (8,)) for dtype in DTYPES}
    specs |= {f"layers.0.mlp.experts.{dtype}": (dtype, (2, 4)) for dtype in DTYPES}
    data = write_checkpoint(tmp_path / "in", specs)
    publish(tmp_path / "in", tmp_path / "store", block=1, version="a", groups=2)
    check_store(tmp_path / "store", specs, data, {0: {0: (0,)}, 1: {0: (1,)}})


def test_the_shared_unit_may_be_empty(tmp_path: Path) -> None:
    specs: dict[str, Spec] = {"layers.0.mlp.experts.gate_up_proj": ("F32", (2, 3))}
    data = write_checkpoint(tmp_path / "in", specs)
    publish(tmp_path / "in", tmp_path / "store", block=1, version="a", groups=2)
    check_store(tmp_path / "store", specs, data, {0: {0: (0,)}, 1: {0: (1,)}})


def test_symbolic_links_to_shards_are_followed(tmp_path: Path) -> None:
    """The hub's cache keeps snapshots as links to blobs."""
    specs = fused()
    data = write_checkpoint(tmp_path / "blobs", specs, shards=2)
    (tmp_path / "in").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "in" / path.name).symlink_to(path)
    publish(tmp_path / "in", tmp_path / "store", block=1, version="a", groups=2)
    check_store(tmp_path / "store", specs, data, SPLIT)
