"""The state file: what is already in the .part file, so that a pull goes on after anything.

A memory-mapped file beside the .part file. A store into a shared mapping survives `kill -9` the moment it is made, so
progress is recorded for nothing: one byte for each chunk (1: verified), and a table of *slots*, each a range of bytes
that were received of a chunk that is not complete. Slots are not trusted: their chunk is hashed in the end.

Power loss is different: the kernel writes the .part file and this one back in any order. So the header names the boot
it was written under; under another boot every chunk that claims to be verified is hashed again from the disk (several
GB/s, and nothing is fetched that is there), and slots are forgotten. The header also names the manifest, the .part
file's inode and whether chunks were hashed at all; whatever does not fit is not used.

Layout, little-endian: magic 16, manifest key 32, size 8, chunk size 8, inode 8, boot 16, hashed 8; a byte a chunk,
padded to 8; 4096 slots of two 8-byte positions, (0, 0) when empty.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import struct
from pathlib import Path

from bzstream.client.kernel import boot_id
from bzstream.client.manifest import Manifest
from bzstream.util.durable import write_file
from bzstream.util.files import read_fully, write_fully

__all__ = ["Journal", "manifest_key"]

_MAGIC = b"bzstream-pull/1\0"
_HEADER = struct.Struct("<16s32sQQQ16sQ")
SLOTS = 4096
"""Far more ranges than workers can leave behind; one that finds no slot is only not resumed."""


def manifest_key(manifest: Manifest) -> bytes:
    """32 bytes that name the bytes a manifest promises, whatever the version they are published under."""
    digest = hashlib.sha256(manifest.sha256 + struct.pack("<QQ", manifest.size, manifest.chunk_size))
    for chunk in manifest.chunks:
        digest.update(chunk)
    return digest.digest()


class Journal:
    """An open state file. One lock of the caller guards everything but `sync`."""

    def __init__(self, path: Path, count: int, chunk_size: int) -> None:
        self.path = path
        self._chunk_size = chunk_size
        self._bytes_at = _HEADER.size
        self._slots_at = self._bytes_at + -(-count // 8) * 8
        self._count = count
        size = self._slots_at + SLOTS * 16
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if os.fstat(self._fd).st_size != size:
                raise ValueError("not a state file of this unit")
            self._map, self._shared = self._load(size)
        except BaseException:
            os.close(self._fd)
            raise
        self._slots = memoryview(self._map)[self._slots_at :].cast("Q")
        self._spare: list[int] = []
        self._used: dict[int, list[int]] = {}
        """Slots of each chunk that is not checked yet."""
        for slot in range(SLOTS):
            begin, end = self._slots[2 * slot], self._slots[2 * slot + 1]
            if begin < end:
                self._used.setdefault(begin // chunk_size, []).append(slot)
            else:
                self._spare.append(slot)

    def _load(self, size: int) -> tuple[mmap.mmap, bool]:
        """The file as memory, and whether the two are one: some file systems have no shared mappings."""
        try:
            return mmap.mmap(self._fd, size), True
        except OSError as error:
            if error.errno not in (errno.ENODEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        memory = mmap.mmap(-1, size)
        read_fully(self._fd, memoryview(memory), 0)
        return memory, False

    @classmethod
    def create(
        cls, path: Path, manifest: Manifest, part: os.stat_result, *, hashed: bool, done: bytes = b""
    ) -> Journal:
        """A new state file in the place of any other, durable before this returns. `done`: a byte a chunk."""
        count = len(manifest.chunks)
        header = _HEADER.pack(
            _MAGIC, manifest_key(manifest), manifest.size, manifest.chunk_size, part.st_ino, boot_id(), int(hashed)
        )
        body = header + done.ljust(-(-count // 8) * 8, b"\0") + bytes(SLOTS * 16)
        write_file(path, body)
        return cls(path, count, manifest.chunk_size)

    @classmethod
    def open(cls, path: Path, manifest: Manifest, part: os.stat_result, *, hashed: bool) -> tuple[Journal, bool] | None:
        """The state file of this manifest and .part file, and whether its claims can be trusted as they are.

        None when there is none, or it is about something else.
        """
        try:
            journal = cls(path, len(manifest.chunks), manifest.chunk_size)
        except (OSError, ValueError):
            return None
        magic, key, size, chunk_size, inode, boot, was_hashed = _HEADER.unpack_from(journal._map)
        expected = (_MAGIC, manifest_key(manifest), manifest.size, manifest.chunk_size, part.st_ino)
        if (magic, key, size, chunk_size, inode) != expected:
            journal.close()
            return None
        same_boot = boot == boot_id() and any(boot)
        return journal, same_boot and (bool(was_hashed) or not hashed)

    @property
    def done(self) -> bytes:
        """A byte a chunk, 1 for verified."""
        return self._map[self._bytes_at : self._bytes_at + self._count]

    def received(self) -> list[tuple[int, int]]:
        """Ranges that were received of incomplete chunks; untrusted, but inside no verified chunk counts."""
        pairs = [(self._slots[2 * slot], self._slots[2 * slot + 1]) for slot in range(SLOTS)]
        return sorted((begin, end) for begin, end in pairs if begin < end)

    def note(self, slot: int | None, begin: int, end: int) -> int | None:
        """[begin, end), within one chunk, is in the .part file. The slot that says so, to be given in again when the
        range has grown; None when all slots are taken.
        """
        if slot is None:
            if not self._spare:
                return None
            slot = self._spare.pop()
            self._used.setdefault(begin // self._chunk_size, []).append(slot)
            self._slots[2 * slot] = begin
        # One aligned 8-byte store: a kill sees the old end or the new one.
        self._slots[2 * slot + 1] = end
        return slot

    def mark_checked(self, index: int, *, good: bool) -> None:
        """A chunk is verified or thrown away; its ranges are forgotten either way."""
        if good:
            self._map[self._bytes_at + index] = 1
        for slot in self._used.pop(index, ()):
            self._slots[2 * slot + 1] = 0
            self._slots[2 * slot] = 0
            self._spare.append(slot)

    def invalidate(self) -> None:
        """Let nobody go on from here: the manifest itself was wrong."""
        self._map[: len(_MAGIC)] = bytes(len(_MAGIC))

    def sync(self) -> None:
        """Write it to the disk; any thread, while the journal is open."""
        if self._shared:
            self._map.flush()
        else:
            write_fully(self._fd, self._map[:], 0)
            os.fsync(self._fd)

    def close(self) -> None:
        self._slots.release()
        self._map.close()
        os.close(self._fd)
