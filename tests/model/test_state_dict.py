"""Publishing a model in memory gives the same store as publishing the checkpoint that it would be saved as."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bzstream.model import BadCheckpoint, SnapshotCache, publish, publish_state_dict

from .build import SPLIT, check_store, fused, separate, write_checkpoint


def hashes(store: Path) -> dict[str, str]:
    cache = SnapshotCache(store)
    cache.refresh()
    assert cache.current is not None
    found = {label: unit.content_hash for label, unit in cache.current.units.items()}
    cache.close()
    return found


@pytest.mark.parametrize("specs", [fused(), separate()], ids=["fused", "separate"])
def test_torch_tensors_give_the_same_bytes_as_their_checkpoint(tmp_path: Path, specs: Any) -> None:
    data = write_checkpoint(tmp_path / "in", specs)
    publish(tmp_path / "in", tmp_path / "files", block=1, version="a", groups=2)
    tensors = {
        name: torch.frombuffer(bytearray(data[name]), dtype=torch.bfloat16).reshape(shape)
        for name, (_, shape) in specs.items()
    }
    report = publish_state_dict(tensors, {"a": 1}, tmp_path / "memory", block=1, version="a", groups=2)
    check_store(tmp_path / "memory", specs, data, SPLIT)
    assert hashes(tmp_path / "memory") == hashes(tmp_path / "files")
    assert report.bytes_source == sum(map(len, data.values()))


def test_every_kind_of_tensor(tmp_path: Path) -> None:
    at = "model.layers.0.mlp.experts"
    base = torch.arange(48, dtype=torch.float32).reshape(4, 3, 4)
    tensors: dict[str, Any] = {
        f"{at}.gate_up_proj": base.transpose(1, 2),  # not contiguous
        f"{at}.down_proj": torch.nn.Parameter(base.to(torch.float8_e4m3fn).view(torch.uint8).float()),  # wants grad
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 3, dtype=torch.float16),
        "flags": torch.tensor([True, False]),
        "eight": torch.arange(4).to(torch.float8_e5m2),
        "half": base[:, 1].to(torch.bfloat16),
        "complex": torch.tensor([1 + 2j], dtype=torch.complex64),
        "slice": base[::2],
        "numpy": np.arange(6, dtype=np.int16).reshape(2, 3).T,
        "numpy big": np.arange(6, dtype=">f4"),
        "numpy scalar": np.float64(2.5),
        "numpy empty": np.empty((0, 2), np.uint32),
    }
    publish_state_dict(tensors, None, tmp_path / "store", block=1, version="a", groups=2)
    cache = SnapshotCache(tmp_path / "store")
    cache.refresh()
    assert cache.current is not None
    (tmp_path / "full.safetensors").write_bytes(cache.current.full.payload.read())
    cache.close()
    as_torch = {}
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            value = torch.from_numpy(np.array(value).astype(value.dtype.newbyteorder("=")))
        as_torch[name] = value.detach().clone().contiguous()
    save_file(as_torch, tmp_path / "wanted.safetensors")
    from safetensors import safe_open

    with (
        safe_open(tmp_path / "full.safetensors", "pt") as got,
        safe_open(tmp_path / "wanted.safetensors", "pt") as want,
    ):
        assert set(got.keys()) == set(want.keys()) == set(tensors)
        for name in tensors:
            left, right = got.get_tensor(name), want.get_tensor(name)
            assert (left.dtype, left.shape) == (right.dtype, right.shape), name
            assert left.reshape(-1).view(torch.uint8).equal(right.reshape(-1).view(torch.uint8)), name


def test_a_changed_state_links_what_did_not_change(tmp_path: Path) -> None:
    at = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {at: torch.zeros(4, 8), "lm_head.weight": torch.ones(3)}
    publish_state_dict(tensors, None, tmp_path / "store", block=1, version="a", groups=4)
    tensors[at][2, 5] = 1
    report = publish_state_dict(tensors, None, tmp_path / "store", block=2, version="b", groups=4)
    assert [unit.unit for unit in report.units if unit.file and not unit.linked] == ["partial/2"]


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({}, "no tensors"),
        ({"a": [1, 2]}, "no numpy array or torch tensor"),
        ({"a": np.array(["x"])}, "cannot hold"),
        ({"a": np.array([1], dtype=np.complex128)}, "cannot hold"),
        ({"": np.zeros(1)}, "no name"),
        ({"__metadata__": np.zeros(1)}, "no name"),
        ({1: np.zeros(1)}, "no name"),
        ({"a": np.zeros(1)}, "no expert tensors"),
        ({"a": torch.zeros(3, device="meta")}, "meta or sparse"),
        ({"a": torch.eye(3).to_sparse()}, "meta or sparse"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, tensors: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadCheckpoint, match=sentence):
        publish_state_dict(tensors, None, tmp_path / "store", block=1, version="a", groups=2)
    assert not (tmp_path / "store").exists()


def test_torch_is_not_imported_for_arrays(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib, numpy; from bzstream.model import publish_state_dict;"
        "store = pathlib.Path(sys.argv[1]);"
        "tensors = {'layers.0.mlp.experts.w': numpy.zeros((2, 2))};"
        "publish_state_dict(tensors, {}, store, block=1, version='a', groups=2);"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_config_is_kept_as_a_file_and_must_be_json(tmp_path: Path) -> None:
    tensors = {"layers.0.mlp.experts.w": np.zeros((2, 4), np.float32)}
    config = {"num_experts": 2, "scale": float("inf"), "text": "\ud800"}
    publish_state_dict(tensors, config, tmp_path / "store", block=1, version="a", groups=2)
    cache = SnapshotCache(tmp_path / "store")
    cache.refresh()
    assert cache.current is not None
    assert cache.current.config == config
    cache.close()
    with pytest.raises(BadCheckpoint, match="cannot be written as JSON"):
        publish_state_dict(tensors, {"dtype": object()}, tmp_path / "store", block=2, version="b", groups=2)
