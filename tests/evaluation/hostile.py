"""Files that a hostile miner submits: each kind with the code that it must end in.

`FILES` maps a name to (maker, code). A maker gets the honest tensors of a slice (name -> float32 array; the slice is
published as bfloat16) and returns the bytes of a file. None needs torch, so that the exact bytes are under control;
what torch itself would write is in `test_readers.py`.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import numpy as np

Tensors = Mapping[str, np.ndarray[Any, Any]]
Maker = Callable[[Tensors], bytes]
FILES: dict[str, tuple[Maker, str]] = {}


def kind(code: str) -> Callable[[Maker], Maker]:
    def add(maker: Maker) -> Maker:
        name = maker.__name__.strip("_")
        assert name not in FILES
        FILES[name] = maker, code
        return maker

    return add


def bf16(array: np.ndarray[Any, Any]) -> bytes:
    """float32 -> bfloat16, truncated: good enough for a test's weights."""
    return (array.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()


# ---- safetensors --------------------------------------------------------------------------------------------------


def raw(head: bytes | Mapping[str, Any], data: bytes = b"", *, length: int | None = None) -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def layout(tensors: Tensors, dtype: str = "BF16") -> tuple[dict[str, Any], bytes]:
    """A valid head and its data."""
    head: dict[str, Any] = {}
    data = b""
    for name, array in tensors.items():
        piece = (
            bf16(array)
            if dtype == "BF16"
            else array.astype({"F32": "<f4", "F64": "<f8", "F16": "<f2"}[dtype]).tobytes()
        )
        head[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(piece)]}
        data += piece
    return head, data


def honest(tensors: Tensors, dtype: str = "BF16") -> bytes:
    return raw(*layout(tensors, dtype))


def first(tensors: Tensors) -> str:
    return next(iter(tensors))


def changed(tensors: Tensors, change: Callable[[dict[str, Any], str], None], *, dtype: str = "BF16") -> bytes:
    head, data = layout(tensors, dtype)
    change(head, first(tensors))
    return raw(head, data)


def with_value(tensors: Tensors, value: float, *, last: bool = False) -> dict[str, np.ndarray[Any, Any]]:
    copy = {name: array.copy() for name, array in tensors.items()}
    name = list(copy)[-1] if last else first(copy)
    copy[name].reshape(-1)[-1 if last else 0] = value
    return copy


@kind("not_safetensors_or_pt")
def empty(tensors: Tensors) -> bytes:
    return b""


@kind("not_safetensors_or_pt")
def seven_bytes(tensors: Tensors) -> bytes:
    return b"\x10\0\0\0\0\0\0"


@kind("not_safetensors_or_pt")
def random_bytes(tensors: Tensors) -> bytes:
    return random.Random(1).randbytes(4096)


@kind("not_safetensors_or_pt")
def an_elf_program(tensors: Tensors) -> bytes:
    return b"\x7fELF\x02\x01\x01" + bytes(4096)


@kind("not_safetensors_or_pt")
def a_gzip_file(tensors: Tensors) -> bytes:
    return b"\x1f\x8b\x08" + zlib.compress(honest(tensors))


@kind("not_safetensors_or_pt")
def a_bare_pickle(tensors: Tensors) -> bytes:
    return pickle.dumps({"a": 1})


@kind("not_safetensors_or_pt")
def head_of_exabytes(tensors: Tensors) -> bytes:
    return raw(b"{}", length=1 << 60)


@kind("not_safetensors_or_pt")
def head_longer_than_the_file(tensors: Tensors) -> bytes:
    return raw(b"{}", length=1000)


@kind("not_safetensors_or_pt")
def head_over_the_cap(tensors: Tensors) -> bytes:
    head, data = layout(tensors)
    return raw(json.dumps(head).encode().ljust(2 << 20), data)


@kind("not_safetensors_or_pt")
def head_that_is_no_json(tensors: Tensors) -> bytes:
    return raw(b"{'a': 1}")


@kind("not_safetensors_or_pt")
def head_nested_half_a_million_deep(tensors: Tensors) -> bytes:
    return raw(b'{"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}")


@kind("not_safetensors_or_pt")
def head_that_is_a_list(tensors: Tensors) -> bytes:
    return raw(b"[]")


@kind("not_safetensors_or_pt")
def head_not_utf8(tensors: Tensors) -> bytes:
    return raw(b'{"\xff\xfe": 1}')


@kind("not_safetensors_or_pt")
def head_with_a_byte_order_mark(tensors: Tensors) -> bytes:
    head, data = layout(tensors)
    return raw(b"\xef\xbb\xbf" + json.dumps(head).encode(), data)


@kind("not_safetensors_or_pt")
def duplicate_key(tensors: Tensors) -> bytes:
    head, data = layout(tensors)
    name = first(tensors)
    text = json.dumps(head)
    return raw(f"{{{json.dumps(name)}:{json.dumps(head[name])},{text[1:]}".encode(), data)


@kind("not_safetensors_or_pt")
def overlapping_tensors(tensors: Tensors) -> bytes:
    def change(head: dict[str, Any], name: str) -> None:
        names = list(head)
        size = head[names[1]]["data_offsets"][1] - head[names[1]]["data_offsets"][0]
        head[names[1]]["data_offsets"] = [0, size]

    return changed(tensors, change)


@kind("not_safetensors_or_pt")
def trailing_data(tensors: Tensors) -> bytes:
    return honest(tensors) + b"more"


@kind("not_safetensors_or_pt")
def cut_in_half(tensors: Tensors) -> bytes:
    whole = honest(tensors)
    return whole[: len(whole) // 2]


@kind("not_safetensors_or_pt")
def cut_by_one_byte(tensors: Tensors) -> bytes:
    return honest(tensors)[:-1]


@kind("not_safetensors_or_pt")
def unknown_dtype(tensors: Tensors) -> bytes:
    return changed(tensors, lambda head, name: head[name].update(dtype="F1024"))


@kind("not_safetensors_or_pt")
def negative_size(tensors: Tensors) -> bytes:
    return changed(tensors, lambda head, name: head[name].update(shape=[-1, -1]))


@kind("not_safetensors_or_pt")
def size_that_overflows(tensors: Tensors) -> bytes:
    return changed(tensors, lambda head, name: head[name].update(shape=[1 << 62, 4, 1 << 62]))


@kind("not_safetensors_or_pt")
def fractional_size(tensors: Tensors) -> bytes:
    return changed(tensors, lambda head, name: head[name].update(shape=[1.0, 2.0]))


@kind("not_safetensors_or_pt")
def number_of_a_hundred_thousand_digits(tensors: Tensors) -> bytes:
    return raw(b'{"a":{"dtype":"F32","shape":[' + b"9" * 100_000 + b'],"data_offsets":[0,0]}}')


@kind("not_safetensors_or_pt")
def thousand_dimensions(tensors: Tensors) -> bytes:
    return changed(tensors, lambda head, name: head[name].update(shape=[1] * 1000))


@kind("not_safetensors_or_pt")
def offsets_backwards(tensors: Tensors) -> bytes:
    return changed(tensors, lambda head, name: head[name].update(data_offsets=head[name]["data_offsets"][::-1]))


@kind("not_safetensors_or_pt")
def metadata_that_is_a_number(tensors: Tensors) -> bytes:
    return changed(tensors, lambda head, name: head.update(__metadata__={"format": 7}))


@kind("not_safetensors_or_pt")
def not_a_number_in_the_head(tensors: Tensors) -> bytes:
    return raw(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,0]}}')


@kind("not_safetensors_or_pt")
def name_with_a_lone_surrogate(tensors: Tensors) -> bytes:
    return raw(b'{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}')


@kind("wrong_keys")
def no_tensors(tensors: Tensors) -> bytes:
    return raw(b"{}")


@kind("wrong_keys")
def a_tensor_missing(tensors: Tensors) -> bytes:
    return honest(dict(list(tensors.items())[1:]))


@kind("wrong_keys")
def a_tensor_too_many(tensors: Tensors) -> bytes:
    return honest({**tensors, "lm_head.weight": np.ones((2, 2), np.float32)})


@kind("not_safetensors_or_pt")
def name_that_writes_on_a_terminal(tensors: Tensors) -> bytes:
    name = first(tensors)
    return honest({f"\x1b[2J{k}" if k == name else k: v for k, v in tensors.items()})


@kind("wrong_keys")
def names_of_another_layer(tensors: Tensors) -> bytes:
    return honest({name.replace("layers.0.", "layers.7."): array for name, array in tensors.items()})


@kind("wrong_keys")
def five_thousand_empty_tensors(tensors: Tensors) -> bytes:
    return honest({f"t{i}": np.zeros((0,), np.float32) for i in range(5000)})


@kind("wrong_shape")
def transposed(tensors: Tensors) -> bytes:
    return honest({name: array.swapaxes(1, 2) for name, array in tensors.items()})


@kind("wrong_shape")
def flattened(tensors: Tensors) -> bytes:
    return honest({name: array.reshape(-1) for name, array in tensors.items()})


@kind("wrong_shape")
def an_expert_more(tensors: Tensors) -> bytes:
    return honest({name: np.concatenate([array, array[:1]]) for name, array in tensors.items()})


@kind("wrong_shape")
def an_empty_tensor(tensors: Tensors) -> bytes:
    return honest({name: array[:0] if name == first(tensors) else array for name, array in tensors.items()})


@kind("wrong_dtype")
def float64(tensors: Tensors) -> bytes:
    return honest(tensors, "F64")


@kind("wrong_dtype")
def raw_bits_as_int16(tensors: Tensors) -> bytes:
    return changed(tensors, lambda head, name: head[name].update(dtype="I16"))


@kind("non_finite")
def nan(tensors: Tensors) -> bytes:
    return honest(with_value(tensors, float("nan")))


@kind("non_finite")
def nan_in_the_last_element(tensors: Tensors) -> bytes:
    return honest(with_value(tensors, float("nan"), last=True))


@kind("non_finite")
def infinity(tensors: Tensors) -> bytes:
    return honest(with_value(tensors, float("inf")))


@kind("non_finite")
def minus_infinity(tensors: Tensors) -> bytes:
    return honest(with_value(tensors, float("-inf")))


@kind("non_finite")
def finite_until_cast(tensors: Tensors) -> bytes:
    return honest(with_value(tensors, 3.4e38), "F32")


@kind("non_finite")
def nan_in_float16(tensors: Tensors) -> bytes:
    return honest(with_value(tensors, float("nan")), "F16")


BFLOAT16_MAX = float.fromhex("0x1.fep127")


def behind_a_dead_unit(tensors: Tensors, value: float) -> dict[str, np.ndarray[Any, Any]]:
    """Expert 0's last hidden unit computes 0, so that `value` in its outgoing weights changes no loss at all."""
    copy = {name: array.copy() for name, array in tensors.items()}
    for name, array in copy.items():
        if "gate_up_proj" in name:
            array[0, array.shape[1] // 2 - 1] = array[0, -1] = 0
        elif "down_proj" in name:
            array[0, :, -1] = value
    return copy


@kind("out_of_range")
def enormous_behind_a_dead_unit(tensors: Tensors) -> bytes:
    return honest(behind_a_dead_unit(tensors, BFLOAT16_MAX))


@kind("out_of_range")
def enormous_and_negative(tensors: Tensors) -> bytes:
    return honest(with_value(tensors, -BFLOAT16_MAX, last=True))


@kind("out_of_range")
def enormous_in_float32(tensors: Tensors) -> bytes:
    return honest(with_value(tensors, 1e30), "F32")


@kind("out_of_range")
def the_largest_float16(tensors: Tensors) -> bytes:
    return honest(with_value(tensors, 65504.0), "F16")


@kind("non_finite")
def a_nan_with_a_payload(tensors: Tensors) -> bytes:
    head, data = layout(tensors, "F32")
    return raw(head, struct.pack("<I", 0xFF80_0001) + data[4:])


@kind("non_finite")
def infinity_in_float16(tensors: Tensors) -> bytes:
    return honest(with_value(tensors, float("-inf")), "F16")


# ---- zips ---------------------------------------------------------------------------------------------------------


class Pickle:
    """A pickle written opcode by opcode."""

    def __init__(self) -> None:
        self.out = bytearray(b"\x80\x02")

    def add(self, *pieces: bytes) -> Pickle:
        for piece in pieces:
            self.out += piece
        return self

    def text(self, value: str) -> Pickle:
        encoded = value.encode()
        return self.add(b"X", struct.pack("<I", len(encoded)), encoded)

    def number(self, value: int) -> Pickle:
        if -(1 << 31) <= value < 1 << 31:
            return self.add(b"J", struct.pack("<i", value))
        raw_value = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
        return self.add(b"\x8a", bytes([len(raw_value)]), raw_value)

    def numbers(self, values: tuple[int, ...]) -> Pickle:
        self.add(b"(")
        for value in values:
            self.number(value)
        return self.add(b"t")

    def named(self, module: str, name: str) -> Pickle:
        return self.add(b"c", module.encode(), b"\n", name.encode(), b"\n")

    def tensor(
        self,
        key: str,
        shape: tuple[int, ...],
        *,
        storage: str = "BFloat16Storage",
        count: int | None = None,
        offset: int = 0,
        strides: tuple[int, ...] | None = None,
    ) -> Pickle:
        if strides is None:
            strides = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
        self.named("torch._utils", "_rebuild_tensor_v2").add(b"((")
        self.text("storage").named("torch", storage).text(key).text("cpu")
        self.number(prod(shape) if count is None else count).add(b"tQ")
        self.number(offset).numbers(shape).numbers(strides).add(b"\x89")
        return self.named("collections", "OrderedDict").add(b")R", b"tR")

    def done(self) -> bytes:
        return bytes(self.out + b".")


def archive(pickled: bytes, storages: Mapping[str, bytes], **more: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as file:
        file.writestr("archive/data.pkl", pickled)
        for name, data in more.items():
            file.writestr(f"archive/{name}", data)
        for key, data in storages.items():
            file.writestr(f"archive/data/{key}", data)
        file.writestr("archive/version", b"3\n")
    return out.getvalue()


def state_dict(tensors: Tensors, **odd: Any) -> bytes:
    """The pickle of an honest state dict; `odd` goes to its first tensor."""
    stream = Pickle().add(b"}(")
    for index, (name, array) in enumerate(tensors.items()):
        arguments = {"key": str(index), "shape": array.shape} | (odd if index == 0 else {})
        stream.text(name).tensor(**arguments)
    return stream.add(b"u").done()


def storages(tensors: Tensors) -> dict[str, bytes]:
    return {str(index): bf16(array) for index, array in enumerate(tensors.values())}


def honest_pt(tensors: Tensors) -> bytes:
    return archive(state_dict(tensors), storages(tensors))


def pt(pickled: bytes) -> Maker:
    return lambda tensors: archive(pickled, storages(tensors))


PICKLES: dict[str, bytes] = {
    "runs_a_command": Pickle().named("os", "system").add(b"(").text("touch /tmp/owned").add(b"tR").done(),
    "evaluates_code": Pickle().named("builtins", "eval").add(b"(").text("1/0").add(b"tR").done(),
    "imports_by_stack_global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
    "reaches_through_an_attribute": b"\x80\x04\x8c\x05torch\x8c\x0fserialization.os\x93.",
    "uses_inst": b"(S'true'\nios\nsystem\n.",
    "uses_obj": b"(cos\nsystem\nS'true'\no.",
    "uses_newobj": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "uses_an_extension": b"\x80\x02\x82\x01.",
    "uses_a_text_persistent_id": b"Pstorage\n.",
    "makes_a_bytearray_of_exabytes": b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b".",
    "makes_a_long_of_gigabytes": b"\x80\x02\x8b" + struct.pack("<i", (1 << 31) - 1) + b".",
    "puts_into_a_memo_of_billions": b"\x80\x02}r\xff\xff\xff\xff0.",
    "asks_for_a_frame_of_exabytes": b"\x80\x04\x95" + struct.pack("<Q", 1 << 63) + b"}.",
    "hashes_for_ever": b"\x80\x02})" + b"q\x01h\x01\x86" * 64 + b"Ns.",
    "has_a_list": b"\x80\x02](K\x01e.",
    "calls_a_tensor": Pickle().tensor("0", (1,)).add(b")R").done(),
    "sets_state_on_a_tensor": Pickle().tensor("0", (1,)).add(b"}", b"b").done(),
    "pops_an_empty_stack": b"\x80\x020000.",
    "is_cut": Pickle().add(b"}(").text("a").done()[:-3],
    "is_empty": b"",
    "counts_to_a_million": b"\x80\x02" + b"}0" * 25_000 + b"}",
    "has_a_frozen_name": Pickle().add(b"}").text("a").named("torch", "float32").add(b"s").done(),
    "wants_a_parameter": Pickle().named("torch._utils", "_rebuild_parameter").done(),
    "wants_a_sparse_tensor": Pickle().named("torch._utils", "_rebuild_sparse_tensor").done(),
    "wants_a_meta_tensor": Pickle().named("torch._utils", "_rebuild_meta_tensor_no_storage").done(),
    "wants_a_quantized_tensor": Pickle().named("torch._utils", "_rebuild_qtensor").done(),
    "wants_an_untyped_storage": Pickle().named("torch.storage", "UntypedStorage").done(),
    "has_numbers_for_names": Pickle().add(b"}K\x01").tensor("0", (1,)).add(b"s").done(),
    "has_a_name_twice": Pickle().add(b"}(").text("a").add(b"N").text("a").add(b"Nu").done(),
}
"""What a data.pkl can do that is neither a dictionary nor a tensor."""

for _name, _pickled in PICKLES.items():
    FILES[f"pickle_{_name}"] = pt(_pickled), "unsafe_pickle"


@kind("wrong_keys")
def pickle_of_a_bare_tensor(tensors: Tensors) -> bytes:
    array = tensors[first(tensors)]
    return archive(Pickle().tensor("0", array.shape).done(), {"0": bf16(array)})


@kind("wrong_keys")
def state_dict_inside_a_dict(tensors: Tensors) -> bytes:
    inner = state_dict(tensors)[2:-1]
    return archive(Pickle().add(b"}").text("model").add(inner, b"s").done(), storages(tensors))


@kind("wrong_keys")
def pt_with_a_tensor_missing(tensors: Tensors) -> bytes:
    rest = dict(list(tensors.items())[1:])
    return archive(state_dict(rest), storages(rest))


@kind("unsafe_pickle")
def pickle_of_megabytes(tensors: Tensors) -> bytes:
    return archive(b"\x80\x02" + b"0" * (4 << 20), storages(tensors))


@kind("bad_layout")
def a_kilobyte_that_claims_a_terabyte(tensors: Tensors) -> bytes:
    return archive(state_dict(tensors, shape=(10**6, 10**6), strides=(0, 0), count=1), storages(tensors))


@kind("bad_layout")
def expanded_from_one_element(tensors: Tensors) -> bytes:
    shape = tensors[first(tensors)].shape
    return archive(state_dict(tensors, strides=(0,) * len(shape)), storages(tensors))


@kind("bad_layout")
def two_tensors_in_one_storage(tensors: Tensors) -> bytes:
    return archive(state_dict(tensors, key="2"), storages(tensors))


@kind("bad_layout")
def a_view_of_a_larger_storage(tensors: Tensors) -> bytes:
    count = tensors[first(tensors)].size + 1
    return archive(state_dict(tensors, count=count), storages(tensors) | {"0": bytes(2 * count)})


@kind("bad_layout")
def an_offset_into_the_storage(tensors: Tensors) -> bytes:
    return archive(state_dict(tensors, offset=1), storages(tensors))


@kind("bad_layout")
def a_negative_offset(tensors: Tensors) -> bytes:
    return archive(state_dict(tensors, offset=-1), storages(tensors))


@kind("bad_layout")
def a_negative_stride(tensors: Tensors) -> bytes:
    return archive(state_dict(tensors, strides=(-1, 1, 1)), storages(tensors))


@kind("bad_layout")
def columns_before_rows(tensors: Tensors) -> bytes:
    _a, b, c = tensors[first(tensors)].shape
    return archive(state_dict(tensors, strides=(b * c, 1, b)), storages(tensors))


@kind("bad_layout")
def a_storage_that_is_missing(tensors: Tensors) -> bytes:
    return archive(state_dict(tensors), {k: v for k, v in storages(tensors).items() if k != "0"})


@kind("bad_layout")
def a_storage_cut_short(tensors: Tensors) -> bytes:
    return archive(state_dict(tensors), storages(tensors) | {"0": b"\0\0"})


@kind("bad_layout")
def a_storage_nobody_uses(tensors: Tensors) -> bytes:
    return archive(state_dict(tensors), storages(tensors) | {"extra": bytes(1024)})


@kind("bad_layout")
def big_endian(tensors: Tensors) -> bytes:
    return archive(state_dict(tensors), storages(tensors), byteorder=b"big")


@kind("wrong_dtype")
def pt_in_float64(tensors: Tensors) -> bytes:
    wide = {str(i): array.astype("<f8").tobytes() for i, array in enumerate(tensors.values())}
    stream = Pickle().add(b"}(")
    for index, (name, array) in enumerate(tensors.items()):
        stream.text(name).tensor(str(index), array.shape, storage="DoubleStorage")
    return archive(stream.add(b"u").done(), wide)


@kind("non_finite")
def nan_in_a_pt(tensors: Tensors) -> bytes:
    return honest_pt(with_value(tensors, float("nan"), last=True))


@kind("non_finite")
def infinity_in_a_pt(tensors: Tensors) -> bytes:
    return honest_pt(with_value(tensors, float("inf")))


@kind("non_finite")
def pt_in_float32_finite_until_cast(tensors: Tensors) -> bytes:
    wide = {str(i): a.astype("<f4").tobytes() for i, a in enumerate(with_value(tensors, 3.4e38).values())}
    stream = Pickle().add(b"}(")
    for index, (name, array) in enumerate(tensors.items()):
        stream.text(name).tensor(str(index), array.shape, storage="FloatStorage")
    return archive(stream.add(b"u").done(), wide)


@kind("out_of_range")
def enormous_in_a_pt(tensors: Tensors) -> bytes:
    return honest_pt(behind_a_dead_unit(tensors, -BFLOAT16_MAX))


@kind("not_safetensors_or_pt")
def a_zip_bomb(tensors: Tensors) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(50 << 20))
    return out.getvalue()


@kind("not_safetensors_or_pt")
def a_zip_without_data_pkl(tensors: Tensors) -> bytes:
    return archive(b"", {}).replace(b"data.pkl", b"code.pkl")


@kind("not_safetensors_or_pt")
def a_zip_with_code_in_it(tensors: Tensors) -> bytes:
    return archive(state_dict(tensors), storages(tensors), **{"code/__torch__.py": b"import os"})


@kind("not_safetensors_or_pt")
def a_zip_that_climbs_out(tensors: Tensors) -> bytes:
    return honest_pt(tensors).replace(b"archive/version", b"../../../passwd")


@kind("not_safetensors_or_pt")
def an_encrypted_zip(tensors: Tensors) -> bytes:
    whole = bytearray(honest_pt(tensors))
    at = whole.rfind(b"PK\x01\x02")
    whole[at + 8] |= 1
    return bytes(whole)


@kind("not_safetensors_or_pt")
def a_zip_with_an_entry_twice(tensors: Tensors) -> bytes:
    return archive(state_dict(tensors), storages(tensors), versiom=b"3\n").replace(
        b"archive/versiom", b"archive/version"
    )


@kind("not_safetensors_or_pt")
def a_zip_whose_entries_overlap(tensors: Tensors) -> bytes:
    whole = bytearray(honest_pt(tensors))
    central = whole.find(b"PK\x01\x02")
    after = whole.find(b"PK\x01\x02", central + 4)
    whole[after + 42 : after + 46] = whole[central + 42 : central + 46]
    return bytes(whole)


@kind("not_safetensors_or_pt")
def a_zip_whose_headers_disagree(tensors: Tensors) -> bytes:
    whole = honest_pt(tensors)
    at = whole.find(b"archive/data/0")
    return whole[:at] + b"archive/data/X" + whole[at + 14 :]


@kind("not_safetensors_or_pt")
def a_zip_with_a_comment(tensors: Tensors) -> bytes:
    whole = honest_pt(tensors)
    return whole[:-2] + b"\x04\0boo!"


@kind("not_safetensors_or_pt")
def a_zip_with_something_after_it(tensors: Tensors) -> bytes:
    return honest_pt(tensors) + b"\0"


@kind("not_safetensors_or_pt")
def a_zip_with_something_before_it(tensors: Tensors) -> bytes:
    return b"PK\x03\x04" + honest_pt(tensors)


@kind("not_safetensors_or_pt")
def a_zip_cut_in_half(tensors: Tensors) -> bytes:
    whole = honest_pt(tensors)
    return whole[: len(whole) // 2]


@kind("not_safetensors_or_pt")
def a_zip_of_a_hundred_thousand_entries(tensors: Tensors) -> bytes:
    entry = struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, 20, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0) + b"a/bb"
    directory = entry * 60_000
    local = b"PK\x03\x04" + bytes(26)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 60_000, 60_000, len(directory), len(local), 0)
    return local + directory + end


@kind("not_safetensors_or_pt")
def a_zip64_that_lies(tensors: Tensors) -> bytes:
    whole = honest_pt(tensors)
    end = whole[-22:]
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 9, 9, 1 << 40, 1 << 50)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, len(whole) - 22, 1)
    return whole[:-22] + record + locator + end
