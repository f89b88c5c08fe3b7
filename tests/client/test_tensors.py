"""`fetch_tensors`: numpy and torch, in place, verified; and what asyncio gets."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bzstream
from bzstream.client import ClientError, Tuning, UnitReport, UsageError, WrongHash
from bzstream.tensorfile import TensorFileError
from tests.client.conftest import QUICK, noise
from tests.client.node import HOTKEY, TOKEN, Node, Unit, safetensors

FLOATS = np.arange(600_000, dtype="<f4").reshape(3, 200, 1000)
TENSORS: dict[str, tuple[str, list[int], bytes]] = {
    "a.weight": ("F32", [3, 200, 1000], FLOATS.tobytes()),
    "b.weight": ("BF16", [2, 3], np.array([[0x3F80, 0x4000, 0], [1, 2, 0xBF80]], "<u2").tobytes()),
    "c.count": ("I64", [], (7).to_bytes(8, "little")),
    "d.mask": ("BOOL", [4], bytes([1, 0, 1, 1])),
    "e.small": ("F8_E4M3", [2], bytes([0x38, 0xB8])),
    "f.none": ("F32", [0, 5], b""),
}


@pytest.fixture
def model() -> bytes:
    ordered = dict(sorted(TENSORS.items(), key=lambda item: -{"F32": 4, "BF16": 2, "I64": 8}.get(item[1][0], 1)))
    return safetensors(ordered)


def arguments(node: Node, **changes: Any) -> dict[str, Any]:
    return {"url": node.url, "hotkey": HOTKEY, "token": TOKEN, "tuning": QUICK, **changes}


@pytest.mark.parametrize("verify", ["sha256", "blake3", "none"])
def test_numpy_arrays_are_views_of_one_block(verify: str, model: bytes) -> None:
    reports: list[UnitReport] = []
    with Node({("partial", 3): Unit(model)}) as node:
        found = bzstream.fetch_tensors(group=3, **arguments(node, verify=verify, report=reports.append))
    assert set(found) == set(TENSORS)
    assert np.array_equal(found["a.weight"], FLOATS)
    assert found["b.weight"].dtype == np.uint16
    assert found["b.weight"].tolist() == [[0x3F80, 0x4000, 0], [1, 2, 0xBF80]]
    assert found["c.count"].shape == ()
    assert int(found["c.count"]) == 7
    assert found["d.mask"].tolist() == [True, False, True, True]
    assert found["f.none"].shape == (0, 5)
    begin = found["a.weight"].__array_interface__["data"][0]
    assert (found["b.weight"].__array_interface__["data"][0] - begin) == FLOATS.nbytes
    found["a.weight"][0, 0, 0] = 5
    assert reports[0].version == "step_1"
    assert reports[0].fetched == len(model)


def test_torch_tensors_have_their_real_dtypes(model: bytes) -> None:
    torch = pytest.importorskip("torch")
    with Node({("shared", None): Unit(model)}) as node:
        found = bzstream.fetch_tensors(unit="shared", framework="torch", **arguments(node))
    assert found["b.weight"].dtype == torch.bfloat16
    assert found["b.weight"].tolist() == [[1.0, 2.0, 0.0], pytest.approx([0, 0, -1.0], abs=1e-30)]
    assert found["e.small"].dtype == torch.float8_e4m3fn
    assert found["e.small"].float().tolist() == [1.0, -1.0]
    assert found["d.mask"].dtype == torch.bool
    assert found["a.weight"].shape == (3, 200, 1000)
    assert torch.equal(found["a.weight"], torch.from_numpy(FLOATS))


def test_the_full_model_and_damage(model: bytes) -> None:
    with Node({("full", None): Unit(model)}) as node:
        found = bzstream.fetch_tensors(unit="full", **arguments(node, hotkey=None))
        assert np.array_equal(found["a.weight"], FLOATS)
        node.lie = "flip"
        with pytest.raises(WrongHash):
            bzstream.fetch_tensors(unit="full", **arguments(node, hotkey=None))


def test_a_version_that_changes_in_the_middle_is_fetched_whole(model: bytes) -> None:
    newer = model[:-30] + bytes(30)
    with Node({("partial", 0): Unit(model)}, rate=1e6) as node:

        def flip(moment: Any) -> None:
            if moment.present > 300_000:
                node.units["partial", 0] = Unit(newer, "step_2")
                node.rate = 0

        reports: list[UnitReport] = []
        bzstream.fetch_tensors(**arguments(node, progress=flip, report=reports.append))
    assert reports[0].version == "step_2"


@pytest.mark.parametrize(
    "payload",
    [
        noise(100_000),
        b"\xff" * 16,
        b"\x02\0\0\0\0\0\0\0{}tail",
        safetensors({"a": ("F32", [2], bytes(9))}),
        safetensors({"a": ("U8", [1], b"x"), "b": ("F32", [1], bytes(4))}),
        safetensors({"a": ("F4", [2], bytes(1))}),
    ],
)
def test_what_is_no_proper_safetensors_is_refused(payload: bytes) -> None:
    with Node({("partial", 0): Unit(payload)}) as node, pytest.raises(TensorFileError):
        bzstream.fetch_tensors(**arguments(node))


def test_wrong_arguments() -> None:
    with Node() as node:
        with pytest.raises(UsageError, match="pinned"):
            bzstream.fetch_tensors(pin=True, **arguments(node))
        with pytest.raises(UsageError):
            bzstream.fetch_tensors(unit="partial", group=None, **arguments(node))


def test_asyncio_does_not_block_and_cancelling_stops_the_threads(model: bytes, tmp_path: Path) -> None:
    async def play() -> None:
        with Node({("partial", 0): Unit(model)}) as node:
            found = await bzstream.fetch_tensors_async(**arguments(node))
            assert np.array_equal(found["a.weight"], FLOATS)
            report = await bzstream.pull_async(**arguments(node), groups=[0], out=tmp_path)
            assert report.fetched == len(model)
            node.lie = "stall"
            stuck = asyncio.create_task(
                bzstream.fetch_tensors_async(**arguments(node, tuning=Tuning(stall_s=60))),
            )
            while node.lie and len(node.data_requests()) < 4:
                await asyncio.sleep(0.01)
            began = time.monotonic()
            stuck.cancel()
            with pytest.raises(asyncio.CancelledError):
                await stuck
            assert time.monotonic() - began < 2
            assert not [t for t in threading.enumerate() if t.name.startswith("bzstream-")]
            with pytest.raises(ClientError):
                await bzstream.pull_async(**arguments(node), groups=[9], out=tmp_path)

    asyncio.run(play())
