"""Hostile and honest files through the reading process, and the bit tests behind `non_finite`."""

from __future__ import annotations

import collections
import contextlib
import io
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bzstream.evaluation.reading.layout import check_layout
from bzstream.evaluation.reading.ptfile import is_zip, read_pt
from bzstream.evaluation.reading.sandbox import Reader
from bzstream.evaluation.reading.specs import CASTS, TensorLocation, TensorSpec, largest_file
from bzstream.evaluation.reading.values import check_values, published_exponent, value_bound
from bzstream.evaluation.rejection_codes import REJECTED, EvaluationError, Failure, Refusal
from bzstream.tensorfile import tensor_bytes
from tests.evaluation.hostile import FILES, honest, honest_pt

Read = Callable[[bytes], list[TensorLocation]]


@pytest.fixture
def read(specs: tuple[TensorSpec, ...], bound: int) -> Read:
    """The reading process's work in this one: `test_pipeline.py` sends every hostile file through real ones."""

    def run(data: bytes) -> list[TensorLocation]:
        def pread(length: int, offset: int) -> bytes:
            return data[offset : offset + length]

        found = check_layout(pread, len(data), specs)
        for locations, w in zip(found, specs, strict=True):
            check_values(pread, locations, w.dtype, bound)
        return found

    return run


@pytest.mark.parametrize("name", FILES)
def test_every_hostile_file_ends_in_its_code(name: str, read: Read, honest_tensors: dict[str, Any]) -> None:
    maker, code = FILES[name]
    data = maker(honest_tensors)
    began = time.monotonic()
    with pytest.raises(Refusal) as caught:
        read(data)
    assert caught.value.code == code, caught.value.detail
    assert caught.value.detail.isprintable(), "the file's own words reached a terminal"
    assert time.monotonic() - began < 5


def test_there_are_many_kinds_of_hostile_file() -> None:
    assert len(FILES) >= 40
    assert {code for _, code in FILES.values()} <= REJECTED.keys()


@pytest.mark.parametrize("make", [honest, honest_pt, lambda t: honest(t, "F32"), lambda t: honest(t, "F16")])
def test_honest_files_are_read(
    make: Callable[[Any], bytes],
    reader: Reader,
    honest_tensors: dict[str, Any],
    specs: tuple[TensorSpec, ...],
    bound: int,
) -> None:
    data = make(honest_tensors)
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        found = reader.read(file.fileno(), len(data), specs, bound)
    for locations, w in zip(found, specs, strict=True):
        raw = data[locations.offset : locations.offset + locations.nbytes]
        kind = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}[locations.dtype]
        found = torch.frombuffer(bytearray(raw), dtype=kind).view(w.shape).float().numpy()
        assert np.allclose(found, honest_tensors[w.name], rtol=1e-2, atol=1e-6)
    assert reader.confinement == "seccomp"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("shape_of_dict", ["dict", "ordered", "module"])
def test_what_torch_save_writes_is_read(
    protocol: int, shape_of_dict: str, read: Read, honest_tensors: dict[str, Any]
) -> None:
    tensors: dict[str, Any] = {name: torch.from_numpy(a).bfloat16() for name, a in honest_tensors.items()}
    if shape_of_dict != "dict":
        tensors = collections.OrderedDict(tensors)
    if shape_of_dict == "module":  # a state dict that torch made carries the versions of its modules as an attribute
        of_module = torch.nn.Module().state_dict()
        of_module.update(tensors)
        tensors = of_module
    out = io.BytesIO()
    torch.save(tensors, out, pickle_protocol=protocol)
    data = out.getvalue()
    for locations in read(data):
        raw = data[locations.offset : locations.offset + locations.nbytes]
        assert torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).equal(tensors[locations.name].flatten())


def _saved(value: object, **options: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()


TORCH_ONLY: dict[str, tuple[Callable[[dict[str, Any]], bytes], set[str]]] = {
    "legacy format": (lambda t: _saved(t, _use_new_zipfile_serialization=False), {"not_safetensors_or_pt"}),
    "a whole module": (lambda t: _saved(torch.nn.Linear(2, 2)), {"unsafe_pickle"}),
    "parameters": (lambda t: _saved({k: torch.nn.Parameter(v) for k, v in t.items()}), {"unsafe_pickle"}),
    "sparse": (lambda t: _saved({k: v.to_sparse() for k, v in t.items()}), {"unsafe_pickle"}),
    "meta": (lambda t: _saved({k: v.to("meta") for k, v in t.items()}), {"unsafe_pickle"}),
    "complex": (lambda t: _saved({k: v.to(torch.complex64) for k, v in t.items()}), {"unsafe_pickle"}),
    "unsigned": (lambda t: _saved({k: v.to(torch.uint16) for k, v in t.items()}), {"unsafe_pickle"}),
    "views": (lambda t: _saved({k: v[:, :1] for k, v in t.items()}), {"bad_layout"}),
    "transposed views": (lambda t: _saved({k: v.mT for k, v in t.items()}), {"bad_layout"}),
    "expanded": (lambda t: _saved({k: v[:1].expand(v.shape) for k, v in t.items()}), {"bad_layout"}),
    "one storage": (lambda t: _saved(dict.fromkeys(t, next(iter(t.values())))), {"bad_layout"}),
    "gradients' hooks": (lambda t: _saved({"model": t, "optimizer": {"lr": 1e-3}}), {"unsafe_pickle", "wrong_keys"}),
    "a python object": (lambda t: _saved({"args": Path("x"), **t}), {"unsafe_pickle"}),
}


@pytest.mark.parametrize("name", TORCH_ONLY)
def test_what_torch_save_can_write_beyond_plain_tensors_is_refused(
    name: str, read: Read, honest_tensors: dict[str, Any]
) -> None:
    make, codes = TORCH_ONLY[name]
    with pytest.raises(Refusal) as caught:
        read(make({k: torch.from_numpy(v).bfloat16() for k, v in honest_tensors.items()}))
    assert caught.value.code in codes, caught.value.detail


# ---- Values that are not finite, or beyond what training reaches ---------------------------------------------------

_TORCH = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_FLOATS = [(source, published) for published, sources in CASTS.items() for source in sources if published in _TORCH]


def _refusal(raw: bytes, source: str, published: str, bound: int = 1000) -> str | None:
    """The code that values end in, None when they pass."""
    locations = TensorLocation("x", source, (len(raw) // (tensor_bytes(source, (1,)) or 1),), 0, len(raw))
    try:
        check_values(lambda length, offset: raw[offset : offset + length], locations, published, bound)
    except Refusal as refusal:
        return refusal.code
    return None


@pytest.mark.parametrize(("source", "published"), [pair for pair in _FLOATS if tensor_bytes(pair[0], (1,)) <= 2])
def test_every_value_of_small_dtypes_is_judged_as_torch_casts_it(source: str, published: str) -> None:
    width = tensor_bytes(source, (1,))
    values = np.arange(1 << (8 * width), dtype=f"<u{width}")
    mine = torch.frombuffer(bytearray(values.tobytes()), dtype=_TORCH[source])
    finite = torch.isfinite(mine.to(_TORCH[published]).float()).numpy()
    magnitude = mine.double().abs().numpy()
    for bound in (6, 9, 15, 1000):
        within = magnitude < 2.0**bound
        edges = np.flatnonzero(np.diff(finite) | np.diff(within))
        for value in values[np.unique(np.r_[0 : len(values) : 97, edges, edges + 1])]:
            expected = "non_finite" if not finite[int(value)] else None if within[int(value)] else "out_of_range"
            assert _refusal(value.tobytes(), source, published, bound) == expected


@pytest.mark.parametrize("published", ["F32", "BF16", "F16"])
@given(
    bits=st.integers(0, (1 << 32) - 1) | st.sampled_from([0x7F7F7FFF, 0x7F7F8000, 0x477FEFFF, 0x477FF000, 0xFF7F8000]),
    bound=st.integers(6, 140),
)
def test_float32_is_judged_as_torch_casts_it(published: str, bits: int, bound: int) -> None:
    raw = bits.to_bytes(4, "little")
    value = torch.frombuffer(bytearray(raw), dtype=torch.float32)
    if not bool(torch.isfinite(value.to(_TORCH[published]))):
        assert _refusal(raw, "F32", published, bound) == "non_finite"
    else:
        assert _refusal(raw, "F32", published, bound) == (None if abs(float(value)) < 2.0**bound else "out_of_range")


@given(st.data())
def test_a_bad_value_is_found_wherever_it_is(data: st.DataObject) -> None:
    count = data.draw(st.sampled_from([1, 1000, (1 << 19) - 1, 1 << 19, (1 << 19) + 1]))
    values = np.zeros(count, "<u2")
    assert _refusal(values.tobytes(), "BF16", "BF16", 6) is None
    value, code = data.draw(
        st.sampled_from(
            [(0x7F80, "non_finite"), (0xFF80, "non_finite"), (0xFFFF, "non_finite"), (0xC280, "out_of_range")]
        )
    )
    values[data.draw(st.integers(0, count - 1))] = value
    assert _refusal(values.tobytes(), "BF16", "BF16", 6) == code


@given(st.lists(st.floats(width=16, allow_nan=False, allow_infinity=False), min_size=1, max_size=50))
def test_the_bound_is_64_times_the_largest_published_magnitude_at_least_64(values: list[float]) -> None:
    raw = np.asarray(values, "<f2").tobytes()
    bound = value_bound([published_exponent(lambda n, at: raw[at : at + n], 0, TensorSpec("x", "F16", (len(values),)))])
    reach = 64 * max([1.0, *map(abs, values)])
    assert reach <= 2**bound <= 2 * reach


def test_subnormals_and_values_of_hard_training_pass() -> None:
    values = np.asarray([5e-324, 1e-45, 1e-40, 63.9, -63.9, 0.0, -0.0], "<f4")
    assert _refusal(values.tobytes(), "F32", "BF16", value_bound([-3])) is None


def test_a_published_slice_that_is_not_finite_is_our_fault() -> None:
    raw = np.asarray([1, np.inf], "<f4").tobytes()
    with pytest.raises(Failure) as caught:
        published_exponent(lambda n, at: raw[at : at + n], 0, TensorSpec("x", "F32", (2,)))
    assert caught.value.code == "baseline_not_finite"


# ---- Fuzz ---------------------------------------------------------------------------------------------------------


@given(
    data=st.data(),
    pickled=st.booleans(),
)
def test_a_damaged_file_is_refused_or_still_the_same_tensors(data: st.DataObject, pickled: bool) -> None:
    """Any byte changed, cut out or put in: a coded refusal, or ranges that lie in the file and do not overlap."""
    tensors = {"a": np.ones((2, 3), np.float32), "b": np.ones((4,), np.float32)}
    specs = [TensorSpec(name, "BF16", array.shape) for name, array in tensors.items()]
    raw = bytearray((honest_pt if pickled else honest)(tensors))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        match data.draw(st.sampled_from("cdi")):
            case "c":
                raw[at] = data.draw(st.integers(0, 255))
            case "d":
                del raw[at : at + data.draw(st.integers(1, 8))]
            case _:
                raw[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        if not raw:
            raw = bytearray(b"\0")
    whole = bytes(raw)
    try:
        found = check_layout(lambda length, offset: whole[offset : offset + length], len(whole), specs)
    except Refusal:  # its code is in the table: the constructor sees to that
        return
    spans = sorted((locations.offset, locations.offset + locations.nbytes) for locations in found)
    assert all(0 <= start <= end <= len(whole) for start, end in spans)
    assert spans[0][1] <= spans[1][0]


@given(st.binary(max_size=400))
def test_any_pickle_is_refused_with_a_code(stream: bytes) -> None:
    from tests.evaluation.hostile import archive

    raw = archive(stream, {"0": b"\0\0"})
    with pytest.raises(Refusal) as caught:
        read_pt(lambda length, offset: raw[offset : offset + length], len(raw), max_tensors=4)
    assert caught.value.code in ("unsafe_pickle", "bad_layout", "wrong_keys")


def test_the_formats_are_told_apart_by_their_first_bytes() -> None:
    assert is_zip(b"PK\x03\x04....")
    assert not is_zip(b"PK\x05\x06....")


def test_the_largest_file_has_room_for_float32_and_heads() -> None:
    specs = [TensorSpec("a", "BF16", (100,)), TensorSpec("b", "U8", (10,))]
    assert 410 + (1 << 20) <= largest_file(specs) <= 410 + (1 << 20) + 16384


def test_a_published_dtype_nobody_can_score_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="cannot be evaluated"):
        largest_file([TensorSpec("a", "C64", (1,))])


# ---- The process --------------------------------------------------------------------------------------------------


def probe(code: str) -> str:
    """Run `code` in a confined reading process, in place of the reader; what it answers."""
    import json
    import socket
    import subprocess
    import sys

    ours, theirs = socket.socketpair()
    program = (
        "import sys, os, json, socket, subprocess, threading; sys.path[:] = sys.argv[2:]\n"
        "from bzstream.evaluation.reading import sandbox_worker\n"
        "def read(fd, size, specs, bound):\n"
        "    try:\n"
        + "".join(f"        {line}\n" for line in code.splitlines())
        + "    except BaseException as error:\n"
        "        return {'found': type(error).__name__ + ' ' + str(getattr(error, 'errno', ''))}\n"
        "sandbox_worker.main(int(sys.argv[1]), read)\n"
    )
    with ours, theirs, tempfile.TemporaryFile() as file:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", program, str(theirs.fileno()), *[p for p in sys.path if p]],
            pass_fds=[theirs.fileno()],
            env={"OPENBLAS_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
        )
        theirs.close()
        body = json.dumps({"size": 0, "memory": 64 << 20, "cpu": 1, "specs": [], "bound": 6}).encode()
        socket.send_fds(ours, [len(body).to_bytes(8, "little")], [file.fileno()])
        ours.sendall(body)
        answer = b""
        with contextlib.suppress(ConnectionResetError):  # it ended without having read the job
            while piece := ours.recv(65536):
                answer += piece
        status = process.wait(timeout=30)
    return str(json.loads(answer)["found"]) if answer else f"ended with {status}"


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        ("open('/etc/passwd').read()", "PermissionError 1"),
        ("open('/tmp/x', 'w')", "PermissionError 1"),
        ("os.listdir('/')", "PermissionError 1"),
        ("socket.socket()", "PermissionError 1"),
        ("subprocess.run(['true'])", "PermissionError 1"),
        ("os.fork()", "PermissionError 1"),
        ("os.kill(1, 9)", "PermissionError 1"),
        ("os.unlink('/tmp/x')", "PermissionError 1"),
        ("threading.Thread(target=print).start()", "RuntimeError "),
        ("return {'found': len(bytearray(1 << 30))}", "MemoryError "),
        ("return {'found': sorted(os.environ)}", "['LC_CTYPE', 'OPENBLAS_NUM_THREADS']"),
        ("while True: pass", f"ended with {-24}"),  # SIGXCPU
    ],
)
def test_the_reading_process_can_do_nothing_else(code: str, answer: str) -> None:
    assert probe(code) == answer


def test_a_file_that_takes_too_long_is_too_costly(
    specs: tuple[TensorSpec, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient = Reader(memory=64 << 20, timeout=0.001)
    try:
        with tempfile.TemporaryFile() as file, pytest.raises(Refusal) as caught:
            impatient.read(file.fileno(), 0, specs, 6)
        assert caught.value.code == "too_costly"
    finally:
        impatient.close()


def test_a_reader_leaves_no_process_behind(specs: tuple[TensorSpec, ...]) -> None:
    before = _children()
    opened = Reader(memory=64 << 20, timeout=10)
    with tempfile.TemporaryFile() as file, pytest.raises(Refusal):
        opened.read(file.fileno(), 0, specs, 6)
    opened.warm_up()
    while not (children := _children() - before):  # the next process is started ahead; pytest's timeout is the limit
        time.sleep(0.01)
    opened.close()
    assert not children & _children()
    with tempfile.TemporaryFile() as file, pytest.raises(Failure):
        opened.read(file.fileno(), 0, specs, 6)


def _children() -> set[str]:
    found: set[str] = set()
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError):  # the thread ended meanwhile
            found |= set(Path(f"/proc/self/task/{task}/children").read_text().split())
    return found


def test_verdicts_cross_processes() -> None:
    again = pickle.loads(pickle.dumps(Refusal("non_finite", "why")))
    assert (again.code, again.detail) == ("non_finite", "why")
    with pytest.raises(ValueError, match="is not a code"):
        Refusal("no_such_code", "")
