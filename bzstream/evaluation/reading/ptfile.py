"""What a `.pt` file holds, without running anything it says.

A checkpoint of `torch.save` is a zip of a pickle (`data.pkl`: names, shapes and which storage each tensor lies in) and
one STORED entry a storage. Both halves are programs that a hostile miner writes for the reader, so both are read here
by a reader that can do nothing else:

- The zip is parsed by hand from its end: no compression, no encryption, no comments, unique names, no entry inside
  another, local and central headers that agree, and nothing but what `torch.save` puts there.
- The pickle is run by the standard library's unpickler in pure Python with a table of opcodes cut down to those that
  `torch.save` emits for a state dict. `find_class` hands out tokens, never callables; `REDUCE` knows two tokens; keys
  are strings (a nested tuple as a key costs 2^n to hash); the size of the pickle is bounded before it starts.
- A tensor must own its whole storage: offset 0, C-contiguous strides, as many elements as its shape, the entry's bytes
  exactly as many as those elements take, and no other tensor in the same storage.

What comes out is a list of byte ranges, the same that a safetensors head gives. `torch.load(weights_only=True)` is no
substitute: it accepts a 1 KB file that claims 10^12 elements, sparse, meta and quantized tensors and aliased storages.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections import OrderedDict
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

from bzstream.evaluation.reading.specs import Pread, TensorLocation, item_size
from bzstream.evaluation.rejection_codes import Refusal

__all__ = ["is_zip", "read_pt"]


def is_zip(start: bytes) -> bool:
    """Whether a file that starts so is to be read as a zip. (As a safetensors head its length would be 67 MB.)"""
    return start[:4] == b"PK\x03\x04"


def read_pt(pread: Pread, size: int, *, max_tensors: int) -> list[TensorLocation]:
    """The tensors of a `torch.save` state dict of at most `max_tensors` tensors, in its own order.

    `pread(length, offset)` reads the file of `size` bytes. Raises Refusal `not_safetensors_or_pt` for a zip that
    torch.save does not write, `unsafe_pickle` for a pickle that does, or means, anything else, `bad_layout` for
    tensors that are not plain arrays of their own.
    """
    # An entry takes about 150 bytes of central directory, a tensor about 300 bytes of pickle.
    entries = _zip_entries(pread, size, max_directory=64 * 1024 + 1024 * max_tensors)
    root = next(iter(entries)).split("/")[0]
    if not root or any(not name.startswith(root + "/") for name in entries):
        raise _broken("its entries do not lie in one folder")
    inner = {name[len(root) + 1 :]: extent for name, extent in entries.items()}
    if "data.pkl" not in inner:
        raise _broken("it has no data.pkl")
    storages = {name[5:]: extent for name, extent in inner.items() if name.startswith("data/")}
    for name, (offset, length) in inner.items():
        if name == "data.pkl" or name.startswith("data/"):
            continue
        if name not in _SMALL or length > 128:
            raise _broken("it holds an entry that torch.save does not write")
        if name == "byteorder" and pread(length, offset) != b"little":
            raise Refusal("bad_layout", "the tensors are not little-endian")
    offset, length = inner["data.pkl"]
    if length > 64 * 1024 + 1024 * max_tensors:
        raise Refusal("unsafe_pickle", f"data.pkl has {length} bytes, more than this group's tensors can need")
    described = _unpickle(pread(length, offset))
    return _place(described, storages)


def _place(described: dict[str, _Tensor], storages: dict[str, tuple[int, int]]) -> list[TensorLocation]:
    """Join the pickle's tensors with the zip's storages, one to one."""
    found: list[TensorLocation] = []
    used: set[str] = set()
    for name, tensor in described.items():
        storage, shape = tensor.storage, tensor.shape
        if storage.key in used:
            raise Refusal("bad_layout", "two tensors share one storage; clone them before saving")
        used.add(storage.key)
        if storage.key not in storages:
            raise Refusal("bad_layout", "a tensor's storage is not in the file")
        offset, length = storages[storage.key]
        count = prod(shape)
        if tensor.offset != 0 or storage.numel != count or length != count * item_size(storage.dtype):
            raise Refusal("bad_layout", "a tensor is not the whole of its storage; clone it before saving")
        stride = 1
        for extent, step in zip(reversed(shape), reversed(tensor.strides), strict=True):
            if extent != 1 and step != stride:
                raise Refusal("bad_layout", "a tensor is not contiguous; call contiguous() before saving")
            stride *= extent
        found.append(TensorLocation(name, storage.dtype, shape, offset, length))
    if used != set(storages):
        raise Refusal("bad_layout", "the file holds storages that no tensor uses")
    return found


# ---- The zip ------------------------------------------------------------------------------------------------------
# APPNOTE.TXT 6.3.10: 4.3.16 end of central directory, 4.3.14-15 its zip64 form, 4.3.12 central header, 4.3.7 local.

_SMALL = frozenset({"version", "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id"})
"""What torch.save (2.0 to 2.13) writes beside the pickle and the storages."""

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_ALLOWED_FLAGS = 0x0808
"""Bit 3 (sizes repeated after the data) and bit 11 (UTF-8 names), as torch sets them. Bit 0 would be encryption."""


def _broken(what: str) -> Refusal:
    return Refusal("not_safetensors_or_pt", f"the file starts like a zip, but {what}; save it with torch.save")


def _zip_entries(pread: Pread, size: int, *, max_directory: int) -> dict[str, tuple[int, int]]:
    """Name -> (offset, length) of the data of each entry, all STORED, disjoint and inside the file."""
    end_at = size - _END.size
    if end_at < 0:
        raise _broken("it is too short")
    mark, disk, first_disk, here, count, length, start, comment = _END.unpack(pread(_END.size, end_at))
    if mark != b"PK\x05\x06" or comment or disk or first_disk or here != count:
        raise _broken("it does not end with a plain end-of-directory record")
    directory_end = end_at
    locator_at = end_at - _END64_LOCATOR.size
    if locator_at >= 0 and pread(4, locator_at) == b"PK\x06\x07":
        _, disk, end64_at, disks = _END64_LOCATOR.unpack(pread(_END64_LOCATOR.size, locator_at))
        if disk or disks != 1 or end64_at + _END64.size != locator_at:
            raise _broken("its zip64 record is not where it says")
        mark, record, _, _, disk, first_disk, here, count64, length64, start64 = _END64.unpack(
            pread(_END64.size, end64_at)
        )
        if mark != b"PK\x06\x06" or record != _END64.size - 12 or disk or first_disk or here != count64:
            raise _broken("its zip64 record is damaged")
        narrow = ((count, 0xFFFF, count64), (length, 0xFFFFFFFF, length64), (start, 0xFFFFFFFF, start64))
        if any(small not in (top, wide) for small, top, wide in narrow):
            raise _broken("its two end-of-directory records differ")
        count, length, start, directory_end = count64, length64, start64, end64_at
    if start + length != directory_end or length > max_directory or not 0 < count <= length // _CENTRAL.size:
        raise _broken("its directory is too large or not at its end")
    directory = pread(length, start)
    entries: dict[str, tuple[int, int]] = {}
    spans: list[tuple[int, int]] = []
    position = 0
    for _ in range(count):
        name, header_at, locations, position = _central_entry(directory, position)
        if name in entries:
            raise _broken("an entry appears twice")
        data_at = _data_offset(pread, header_at, name, start)
        if data_at + locations > start:
            raise _broken("an entry reaches into the directory")
        entries[name] = (data_at, locations)
        spans.append((header_at, data_at + locations))
    if position != length:
        raise _broken("its directory holds more than its entries")
    spans.sort()
    if spans[0][0] != 0 or any(end > begin for (_, end), (begin, _) in pairwise(spans)):
        raise _broken("its entries overlap or do not start at the file's start")
    return entries


def _central_entry(directory: bytes, position: int) -> tuple[str, int, int, int]:
    """One central header: (name, offset of its local header, bytes locations, position of the next header)."""
    if position + _CENTRAL.size > len(directory):
        raise _broken("its directory is cut")
    (mark, _made, _needed, flags, method, _time, _date, _crc, packed, plain, name_len, extra_len, comment_len, disk,
     _internal, _external, header_at) = _CENTRAL.unpack_from(directory, position)  # fmt: skip
    if mark != b"PK\x01\x02" or disk or comment_len:
        raise _broken("its directory is damaged")
    if method != 0 or flags & ~_ALLOWED_FLAGS:
        raise _broken("an entry is compressed or encrypted")
    name_at = position + _CENTRAL.size
    extra_at, next_at = name_at + name_len, name_at + name_len + extra_len
    if next_at > len(directory):
        raise _broken("its directory is cut")
    try:
        name = directory[name_at:extra_at].decode("ascii")
    except UnicodeDecodeError:
        raise _broken("an entry's name is not ASCII") from None
    if not name or not name.isprintable() or len(name) > 512:
        raise _broken("an entry's name is empty, too long or not printable")
    wide = _zip64_extra(directory[extra_at:next_at])
    values: list[int] = []
    for value in (plain, packed, header_at):
        if value == 0xFFFFFFFF:
            if not wide:
                raise _broken("a zip64 size is missing")
            value = wide.pop(0)
        values.append(value)
    if values[0] != values[1]:
        raise _broken("an entry's locations size differs from its real size")
    return name, values[2], values[0], next_at


def _zip64_extra(extra: bytes) -> list[int]:
    """The 64-bit values of the zip64 extra field (id 1) in their order; [] when there is none."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        position += 4
        if kind == 1:
            body = extra[position : position + length]
            return [value for (value,) in struct.iter_unpack("<Q", body[: len(body) // 8 * 8])]
        position += length
    return []


def _data_offset(pread: Pread, header_at: int, name: str, limit: int) -> int:
    """Where the data of the entry begins, by its local header, which must agree with the central one."""
    if header_at + _LOCAL.size > limit:
        raise _broken("an entry lies outside the file")
    mark, _, flags, method, _, _, _, _, _, name_len, extra_len = _LOCAL.unpack(pread(_LOCAL.size, header_at))
    encoded = name.encode("ascii")
    if mark != b"PK\x03\x04" or method != 0 or flags & ~_ALLOWED_FLAGS or name_len != len(encoded):
        raise _broken("an entry's two headers differ")
    if pread(name_len, header_at + _LOCAL.size) != encoded:
        raise _broken("an entry's two headers differ")
    return header_at + _LOCAL.size + len(encoded) + int(extra_len)


# ---- The pickle ---------------------------------------------------------------------------------------------------


class _StorageType(NamedTuple):
    dtype: str


class _Storage(NamedTuple):
    dtype: str
    key: str
    numel: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_ORDERED = object()
_REBUILD = object()
_GLOBALS: dict[tuple[str, str], object] = {
    ("collections", "OrderedDict"): _ORDERED,
    ("torch._utils", "_rebuild_tensor_v2"): _REBUILD,
    ("torch", "FloatStorage"): _StorageType("F32"),
    ("torch", "HalfStorage"): _StorageType("F16"),
    ("torch", "BFloat16Storage"): _StorageType("BF16"),
    ("torch", "DoubleStorage"): _StorageType("F64"),
    ("torch", "LongStorage"): _StorageType("I64"),
    ("torch", "IntStorage"): _StorageType("I32"),
    ("torch", "ShortStorage"): _StorageType("I16"),
    ("torch", "CharStorage"): _StorageType("I8"),
    ("torch", "ByteStorage"): _StorageType("U8"),
    ("torch", "BoolStorage"): _StorageType("BOOL"),
}
"""The whole world of a miner's pickle. The values are tokens that `_Unpickler` understands; none can be called."""

_STOCK: Any = pickle._Unpickler  # pure Python: the C one hides its opcode table
_OPCODES = (
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK,
    pickle.EMPTY_DICT, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3,
    pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1,
    pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE,
    pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET,
    pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.BINPERSID, pickle.REDUCE, pickle.BUILD, pickle.SETITEM, pickle.SETITEMS,
)  # fmt: skip
"""What torch.save emits for a state dict in protocols 2 to 5 and nothing else: no lists, sets, bytes, INST, OBJ,
NEWOBJ, EXT or buffers."""


class _Unpickler(_STOCK):  # type: ignore[misc]
    dispatch = {code[0]: _STOCK.dispatch[code[0]] for code in _OPCODES}  # noqa: RUF012 (the base declares it so)

    def find_class(self, module: str, name: str) -> object:
        try:
            return _GLOBALS[module, name]
        except KeyError:
            shown = ascii(f"{module}.{name}"[:80])
            raise Refusal("unsafe_pickle", f"the pickle asks for {shown}; only plain tensors are read") from None

    def persistent_load(self, pid: object) -> _Storage:
        if type(pid) is tuple and len(pid) == 5:
            kind, storage_type, key, _location, count = pid
            known = kind == "storage" and type(storage_type) is _StorageType and type(key) is str
            if known and type(count) is int and 0 <= count < 2**48:
                return _Storage(storage_type.dtype, key, count)
        raise _unsafe("a storage is not described as torch.save does")

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack[-1]
        if type(arguments) is not tuple:
            raise _unsafe("a call has no arguments tuple")
        if function is _ORDERED and not arguments:
            self.stack[-1] = OrderedDict()
        elif function is _REBUILD:
            self.stack[-1] = _rebuild(arguments)
        else:
            raise _unsafe("it calls something that is no tensor and no dictionary")

    dispatch[pickle.REDUCE[0]] = load_reduce

    def load_build(self) -> None:
        # A module's state dict carries `_metadata` (versions of its submodules); nothing here reads it.
        state = self.stack.pop()
        if type(self.stack[-1]) is not OrderedDict or type(state) is not dict or set(state) != {"_metadata"}:
            raise _unsafe("it sets the state of an object")

    dispatch[pickle.BUILD[0]] = load_build

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _set(self.stack[-1], key, value)

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            _set(self.stack[-1], key, value)

    dispatch[pickle.SETITEMS[0]] = load_setitems


def _unsafe(what: str) -> Refusal:
    return Refusal("unsafe_pickle", f"the pickle is refused: {what}; save a plain state dict of tensors")


def _set(target: object, key: object, value: object) -> None:
    if type(target) not in (dict, OrderedDict) or type(key) is not str:
        raise _unsafe("it fills something that is no dictionary of names")
    assert isinstance(target, dict)
    if key in target:
        raise _unsafe("a name appears twice")
    target[key] = value


def _rebuild(arguments: tuple[Any, ...]) -> _Tensor:
    """`_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks[, metadata])`, every type checked."""
    if len(arguments) not in (6, 7) or (len(arguments) == 7 and arguments[6] is not None):
        raise _unsafe("a tensor has extra attributes")
    storage, offset, shape, strides, _grad, hooks = arguments[:6]
    if type(storage) is not _Storage or type(hooks) is not OrderedDict or hooks:
        raise _unsafe("a tensor has no plain storage, or has hooks")
    for values in (shape, strides):
        if (
            type(values) is not tuple
            or len(values) > 8
            or any(type(v) is not int or not 0 <= v < 2**48 for v in values)
        ):
            raise Refusal("bad_layout", "a tensor's shape or strides are not sizes")
    if type(offset) is not int or len(shape) != len(strides):
        raise Refusal("bad_layout", "a tensor's shape and strides do not fit")
    return _Tensor(storage, offset, shape, strides)


def _unpickle(data: bytes) -> dict[str, _Tensor]:
    try:
        found = _Unpickler(io.BytesIO(data)).load()
    except Refusal:
        raise
    except Exception as error:  # whatever a hostile stream provokes in the stock opcodes: IndexError, KeyError, …
        raise _unsafe(f"it is damaged or uses an opcode that is not allowed ({type(error).__name__})") from None
    if type(found) not in (dict, OrderedDict) or not all(type(tensor) is _Tensor for tensor in found.values()):
        raise Refusal("wrong_keys", "the file is not one flat dictionary of tensors")
    assert isinstance(found, dict)
    return found
