"""`fetch_tensors`: a unit straight into the memory that its tensors will live in. No file, no second copy.

The whole unit is received into one page-aligned block, each byte where it stays; the tensors are views of it, so that
the block lives as long as any of them. bzstream's files place every tensor on a boundary of its own element size, and
a file that does not is refused rather than copied. Nothing is looked at before its chunk's hash was right.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Sequence
from typing import Any, Literal

from bzstream.chain.keys import Key
from bzstream.client.address import UnitRef
from bzstream.client.coded import coded_chunks
from bzstream.client.errors import ProtocolViolation, UsageError, VersionChanged
from bzstream.client.fetch_plan import FetchPlan
from bzstream.client.manifest import Manifest
from bzstream.client.progress import Progress, UnitReport
from bzstream.client.session import Session
from bzstream.client.session_factory import Options, choose_receiver, open_session
from bzstream.client.sinks import MemorySink
from bzstream.client.streaming_sha256 import StreamingSha256
from bzstream.client.transfer import Transfer
from bzstream.client.tuning import Tuning
from bzstream.tensorfile import Head, TensorFileError, parse_head
from bzstream.util.dtypes import DTYPES

__all__ = ["fetch_tensors"]

MAX_HEAD = 32 * 1024 * 1024
"""Bytes of head accepted: the full Qwen3-VL-30B-A3B names some 19,000 tensors when they are stored one by one. Its
hash was checked before, so that only the publisher could make it costly to parse."""


def fetch_tensors(
    url: str | Sequence[str],
    group: int | None = 0,
    *,
    unit: Literal["partial", "shared", "full"] | None = None,
    framework: Literal["numpy", "torch"] = "numpy",
    pin: bool = False,
    hotkey: str | None = None,
    key: str | Key | None = None,
    token: str | None = None,
    connections: int | None = None,
    verify: Literal["sha256", "blake3", "none"] = "blake3",
    validator_hotkey: str | None = None,
    receiver: str | None = None,
    version: str | None = None,
    ca_file: str | None = None,
    progress: Callable[[Progress], None] | None = None,
    notify: Callable[[str], None] | None = None,
    report: Callable[[UnitReport], None] | None = None,
    tuning: Tuning | None = None,
    on_open: Callable[[Session], None] | None = None,
) -> dict[str, Any]:
    """The tensors of a group's slice, of the shared part (`unit="shared"`) or the full model (`unit="full"`), by name.

    With `framework="numpy"` writable arrays; numpy has no bfloat16 and no 8-bit floats, which come as their raw bits
    (uint16, uint8). With "torch" CPU tensors of the real dtype, in page-locked memory if `pin` (which needs CUDA).
    `report` is called with the finished unit's report: version, block, content hash, bytes. The other arguments are
    those of `pull`; `verify` is "blake3" here, as a whole-file SHA-256 would take longer than a fast link does, and
    the manifest that names the chunks' hashes is the one that names the file's.

    Memory: the unit's size, once. Raises ClientError, and TensorFileError for a file that is no proper safetensors.
    """
    if pin and framework != "torch":
        raise UsageError("only torch tensors can be pinned; give framework='torch'")
    ref = UnitRef("partial", group) if unit in (None, "partial") and group is not None else UnitRef(unit or "shared")
    if ref.kind == "partial" and ref.group is None:
        raise UsageError("a slice needs the number of its group")
    options = Options(hotkey, key, token, validator_hotkey, receiver, version, ca_file, connections)
    session = open_session(url, options, tuning or Tuning(), notify, claim_needed=ref.kind != "full")
    if on_open is not None:
        on_open(session)
    try:
        choose_receiver(session)
        for _ in range(session.tuning.max_wrong):
            manifest = session.manifest(ref, version, validator_hotkey)
            try:
                memory, owner = _allocate(manifest.size, framework, pin=pin)
                done = _receive(session, manifest, memory, options, verify, progress or (lambda _: None))
            except VersionChanged:
                session.notify("the server has moved on to another version; starting that one")
                session.readmit_changed()
                continue
            head = parse_head(_head_bytes(memory), manifest.size, max_head=MAX_HEAD, aligned=True)
            if report is not None:
                report(done)
            return _torch_views(head, owner) if framework == "torch" else _numpy_views(head, memory)
        raise ProtocolViolation(f"{session.mirrors[0].address} changes its version faster than it can be fetched")
    finally:
        session.close()


def _allocate(size: int, framework: str, *, pin: bool) -> tuple[memoryview, Any]:
    """Fresh memory of `size` bytes on a page boundary, and the object that owns it for the framework."""
    if pin:
        import torch

        tensor = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return memoryview(tensor.numpy()).cast("B"), tensor
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        # 2 MiB pages: a fraction of the page faults' cost is left. (A shared mapping, mmap's default, gets none.)
        area.madvise(mmap.MADV_HUGEPAGE)
    if framework == "torch":
        import torch

        return memoryview(area), torch.frombuffer(area, dtype=torch.uint8)
    return memoryview(area), area


def _receive(
    session: Session,
    manifest: Manifest,
    memory: memoryview,
    options: Options,
    verify: str,
    on_progress: Callable[[Progress], None],
) -> UnitReport:
    def read_into(position: int, view: memoryview) -> None:
        view[:] = memory[position : position + len(view)]

    sha256 = StreamingSha256(manifest.size, read_into, session.tuning) if verify == "sha256" else None
    transfer = Transfer(
        session,
        manifest,
        FetchPlan(manifest.size, manifest.chunk_size),
        MemorySink(memory, session.tuning),
        version=options.version,
        workers=options.connections,
        check=verify != "none",
        sha256=sha256,
        coded=coded_chunks(session, manifest),
    )
    transfer.run(on_progress)
    return transfer.report()


def _head_bytes(memory: memoryview) -> bytes:
    """The bytes before the data section, as far as there are any; `parse_head` judges them."""
    length = int.from_bytes(memory[:8], "little")
    return bytes(memory[: 8 + min(length, MAX_HEAD)])


def _numpy_views(head: Head, memory: memoryview) -> dict[str, Any]:
    import numpy as np

    found: dict[str, Any] = {}
    for tensor in head.tensors:
        dtype = DTYPES[tensor.dtype].numpy
        if dtype is None:
            raise TensorFileError(f"the tensor {tensor.name!r} is {tensor.dtype}, which numpy cannot hold")
        raw = memory[head.data_start + tensor.start : head.data_start + tensor.end]
        array = np.frombuffer(raw, dtype) if len(raw) else np.empty(0, dtype)
        found[tensor.name] = array.reshape(tensor.shape)
    return found


def _torch_views(head: Head, block: Any) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {}
    for tensor in head.tensors:
        dtype = getattr(torch, DTYPES[tensor.dtype].torch or "", None)
        if dtype is None:
            raise TensorFileError(f"the tensor {tensor.name!r} is {tensor.dtype}, which this torch cannot hold")
        raw = block[head.data_start + tensor.start : head.data_start + tensor.end]
        found[tensor.name] = raw.view(dtype).reshape(tensor.shape)
    return found
