"""One pass over the source: hash the full model, fill the unit files and hash them, on all cores, in bounded memory.

The source is read once, in the order of the full view, buffer by buffer. Each buffer goes to the queues (`hash_pool`)
that hash the view, and its pieces go to the queues of the units that they belong to: one hashes the unit, one its
chunks, one writes the file. The chain that cannot be shortened is the SHA-256 of the full view, some 1.6 GB/s.

A unit whose bytes did not change is not written but hard-linked from the snapshot before. That is not known until its
last byte, so a unit with a candidate of equal size begins by *comparing* its pieces with the old file. The first
difference creates the new file, copies into it the stretches that were found equal (from the old file, as the source's
buffers are used again by then), and goes on writing. So the source is read once either way, and nothing is written
twice. Comparing with the bytes, not the recorded hashes, also heals an old file that was damaged on the disk.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy

from bzstream.model.checkpoint import Checkpoint
from bzstream.model.digest import ChunkHasher, Digest, digest_file, read_blocks
from bzstream.model.hash_pool import Buffer, HashPool, SerialQueue
from bzstream.model.plan import CopyRun, Plan
from bzstream.util.files import read_fully, write_fully

__all__ = ["Outcome", "UnitOutcome", "buffers_of", "write_units"]

BUFFER_SIZE = 2 * 1024 * 1024
"""Bytes handed round at once: large against the cost of a job (some 20 µs), small against a core's cache. It divides
a chunk, so a buffer never crosses a chunk of the view."""

BUFFERS = 24
"""Buffers in flight: how far the queues may drift apart. 48 MiB, the bulk of a publish's memory."""

Piece = tuple[memoryview, int]
"""Bytes, and their offset in the unit's file."""


class UnitOutcome(NamedTuple):
    """What became of one unit: its hashes (None in a dry run) and whether its bytes equal the old file's."""

    digest: Digest | None
    linked: bool


class Outcome(NamedTuple):
    """What `write_units` did; `view` is None in a dry run."""

    units: tuple[UnitOutcome, ...]
    view: Digest | None


def write_units(
    plan: Plan,
    checkpoint: Checkpoint,
    folder: Path | None,
    candidates: Mapping[int, Path],
    progress: Callable[[int], None] | None = None,
) -> Outcome:
    """Fill `folder` with the plan's unit files, durably, and hash everything; with `folder` None only compare.

    `candidates` maps units to files of the snapshot before. `progress` is called with the bytes of each buffer that was
    read. Raises OSError when writing fails, SourceChanged when reading does.
    """
    with ExitStack() as cleanup:
        files = []
        for unit, item in enumerate(plan.units):
            files.append(_UnitWriter(folder and folder / item.file, item.size, candidates.get(unit)))
            cleanup.callback(files[-1].close)
        pool = cleanup.enter_context(HashPool(buffers=BUFFERS, buffer_size=BUFFER_SIZE))
        view = _UnitStream(pool, None, hashed=folder is not None)
        streams = [
            _UnitStream(pool, file, hashed=folder is not None and item.streamed)
            for file, item in zip(files, plan.units, strict=True)
        ]
        for stream, item in zip(streams, plan.units, strict=True):
            stream.put([(memoryview(item.head), 0)], None)
        _read(plan, checkpoint, pool, view, streams, progress)
        pool.drain()
        if folder is None:
            return Outcome(tuple(UnitOutcome(None, file.linked) for file in files), None)
        digests: dict[int, Digest] = {}
        for unit, (stream, item) in enumerate(zip(streams, plan.units, strict=True)):
            stream.queues[0].put(stream.file.finish)  # type: ignore[union-attr]
            if not item.streamed:
                stream.queues[0].put(partial(_digest_again, digests, unit, folder / item.file))
        pool.drain()
        return Outcome(
            tuple(
                UnitOutcome(digests.get(unit) or stream.digest(), file.linked)
                for unit, (stream, file) in enumerate(zip(streams, files, strict=True))
            ),
            view.digest(),
        )


def buffers_of(plan: Plan, size: int) -> Iterator[list[CopyRun]]:
    """The full view cut into stretches of `size` bytes; its head appears as a run of source -1 without targets."""
    parts: list[CopyRun] = []
    free = size
    for run in (CopyRun(-1, 0, len(plan.head), ()), *plan.runs):
        done = 0
        while done < run.length:
            count = min(free, run.length - done)
            targets = tuple((unit, offset + done) for unit, offset in run.targets)
            parts.append(CopyRun(run.source, run.offset + done, count, targets))
            done, free = done + count, free - count
            if not free:
                yield parts
                parts, free = [], size
    if parts:
        yield parts


class _UnitStream:
    """The queues of one unit, or of the full view: [write or compare, SHA-256, BLAKE3 chunks]."""

    def __init__(self, pool: HashPool, file: _UnitWriter | None, *, hashed: bool) -> None:
        self.file = file
        self._sha, self._chunks = hashlib.sha256(), ChunkHasher()
        self._jobs: list[Callable[[memoryview, int], object]] = [] if file is None else [file.put]
        if hashed:
            self._jobs += [lambda data, _: self._sha.update(data), lambda data, _: self._chunks.update(data)]
        self.queues = [SerialQueue(pool) for _ in self._jobs]

    @property
    def users(self) -> int:
        """Jobs of one `put`."""
        return len(self.queues)

    def put(self, pieces: list[Piece], buffer: Buffer | None) -> None:
        for queue, job in zip(self.queues, self._jobs, strict=True):
            queue.put(partial(_each, job, pieces), buffer)

    def digest(self) -> Digest:
        return Digest(self._sha.hexdigest(), self._chunks.finish())


class _UnitWriter:
    """One unit file: compared with its candidate for as long as they are equal, then written.

    Its methods run in the pool, one after the other in one queue; `close` runs after the pool has ended.
    """

    def __init__(self, path: Path | None, size: int, candidate: Path | None) -> None:
        self._path, self._size = path, size
        self._fd = self._old = -1
        self._candidate = candidate
        self._equal: list[tuple[int, int]] = []
        if candidate is not None:
            self._old = _open_candidate(candidate, size)
        self.linked = self._old >= 0
        if not self.linked and path is not None:
            self._fd = _create(path)

    def put(self, data: memoryview, offset: int) -> None:
        if self.linked:
            if _same(self._old, data, offset):
                self._note_equal(offset, offset + len(data))
                return
            self._start_writing()
        if self._fd >= 0:
            write_fully(self._fd, data, offset)

    def finish(self) -> None:
        """Make the file durable, or link the old one in its place."""
        if self.linked:
            assert self._path is not None
            assert self._candidate is not None
            try:
                os.link(self._candidate, self._path, follow_symlinks=False)
                return
            except OSError as error:
                # EMLINK: the file system's limit; EPERM: one without hard links. A copy is as good, only not free.
                if error.errno not in (errno.EMLINK, errno.EPERM, errno.ENOTSUP):
                    raise
            self._start_writing()
        os.fsync(self._fd)

    def close(self) -> None:
        for fd in (self._fd, self._old):
            if fd >= 0:
                os.close(fd)
        self._fd = self._old = -1

    def _note_equal(self, begin: int, end: int) -> None:
        if self._equal and self._equal[-1][1] == begin:
            begin = self._equal.pop()[0]
        self._equal.append((begin, end))

    def _start_writing(self) -> None:
        """The files differ: begin a new one with what was found equal."""
        self.linked = False
        if self._path is None:
            return
        self._fd = _create(self._path)
        for begin, end in self._equal:
            for block in read_blocks(self._old, begin, end - begin):
                write_fully(self._fd, block, begin)
                begin += len(block)
            if begin < end:
                raise OSError(errno.EIO, "a file of the snapshot before was cut while it was being compared")


def _read(
    plan: Plan,
    checkpoint: Checkpoint,
    pool: HashPool,
    view: _UnitStream,
    streams: list[_UnitStream],
    progress: Callable[[int], None] | None,
) -> None:
    """Read the full view buffer by buffer and hand each buffer to the streams that need some of it."""
    for parts in buffers_of(plan, BUFFER_SIZE):
        buffer = pool.buffer()
        buffer.users = 1  # the reader itself, so that no early job gives the buffer back
        pieces: dict[int, list[Piece]] = {}
        filled = 0
        for part in parts:
            data = buffer.view[filled : filled + part.length]
            filled += part.length
            if part.source < 0:
                data[:] = plan.head[part.offset : part.offset + part.length]
            else:
                checkpoint.sources[part.source].read_into(part.offset, data)
            for unit, offset in part.targets:
                pieces.setdefault(unit, []).append((data, offset))
        pool.use(buffer, view.users + sum(streams[unit].users for unit in pieces))
        view.put([(buffer.view[:filled], 0)], buffer)
        for unit, own in pieces.items():
            streams[unit].put(own, buffer)
        pool.done(buffer)
        if progress is not None:
            progress(filled)


def _each(job: Callable[[memoryview, int], object], pieces: list[Piece]) -> None:
    for data, offset in pieces:
        job(data, offset)


def _digest_again(into: dict[int, Digest], unit: int, path: Path) -> None:
    into[unit] = digest_file(path)


def _open_candidate(path: Path, size: int) -> int:
    """A descriptor of the old file, or -1 when it cannot be the same."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return -1
    if os.fstat(fd).st_size == size:
        return fd
    os.close(fd)
    return -1


def _create(path: Path) -> int:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    os.fchmod(fd, 0o644)  # whatever the umask
    return fd


def _same(fd: int, data: memoryview, offset: int) -> bool:
    """Whether the file holds `data` at `offset`."""
    scratch = memoryview(bytearray(len(data)))
    return read_fully(fd, scratch, offset) == len(data) and numpy.array_equal(
        numpy.frombuffer(scratch, numpy.uint8), numpy.frombuffer(data, numpy.uint8)
    )
