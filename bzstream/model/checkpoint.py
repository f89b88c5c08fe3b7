"""What is published: a checkpoint folder as Hugging Face writes it, or a state dict in memory, behind one interface.

A folder holds `model.safetensors`, or `model.safetensors.index.json` with the files it names, and `config.json`.
Everything is checked before a byte is copied: every file that the index names is there, every head is exact
(`tensorfile`), index and files name the same tensors, and no tensor is in two files. A `model.safetensors` that an
index does not name is refused: one of the two is a leftover of an earlier save, and publishing the wrong one would be
silent.

Sources are read through open descriptors, and each file's identity, size and modification time are compared when
all is read: a checkpoint that a trainer wrote to meanwhile is not published.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from bzstream.model.errors import BadCheckpoint, SourceChanged
from bzstream.model.naming import TensorInfo
from bzstream.model.small_files import CONFIG, parse_config, read_json_object, read_small_files
from bzstream.tensorfile import Tensor, TensorFileError, read_head
from bzstream.util.files import file_stamp, read_fully, stamp_of

__all__ = ["Checkpoint", "FileSource", "Place", "Source", "open_folder"]

MAX_SOURCE_HEAD = 32 * 1024 * 1024
"""Bytes of JSON in the head of one of the validator's own files: 200,000 tensors. (DeepSeek-V3 has 91,000 in all.)"""

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Source(Protocol):
    """Somewhere that tensor bytes are read from."""

    name: str

    def read_into(self, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `offset` on. Raises SourceChanged when they are not there any more."""

    def check(self) -> None:
        """Raise SourceChanged when the source was written to since it was opened."""

    def close(self) -> None: ...


class Place(NamedTuple):
    """Where a tensor's bytes begin: `offset` bytes into the source with the index `source`."""

    source: int
    offset: int


class Checkpoint(ExitStack):
    """All tensors of a model and where their bytes are; a context manager that closes its sources.

    `files` are the small files, name -> content; `left_out` names those for which a snapshot has no room. `config` is
    what config.json says, None without one. `metadata` is what the sources' heads say beyond tensors, such as the
    names of tensors that are tied to others and therefore not stored (`{"lm_head.weight": "model.embed…weight"}`).
    """

    def __init__(
        self, sources: Iterable[Source], files: Mapping[str, bytes] | None = None, left_out: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        self.sources = tuple(sources)
        for source in self.sources:
            self.callback(source.close)
        self.files = files or {}
        self.left_out = left_out
        self.config: Mapping[str, Any] | None = None
        self.metadata: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.places: dict[str, Place] = {}

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors.values())

    def add(self, source: int, tensors: Iterable[Tensor], data_start: int) -> None:
        """Take in the tensors of one source. Raises BadCheckpoint for a name that came before."""
        for tensor in tensors:
            if tensor.name in self.tensors:
                first = self.sources[self.places[tensor.name].source].name
                raise BadCheckpoint(f"the tensor {tensor.name} is in both {first} and {self.sources[source].name}")
            self.tensors[tensor.name] = TensorInfo(tensor.name, tensor.dtype, tensor.shape, tensor.end - tensor.start)
            self.places[tensor.name] = Place(source, data_start + tensor.start)

    def check(self) -> None:
        """Raise SourceChanged when any source was written to since it was opened."""
        for source in self.sources:
            source.check()


class FileSource:
    """A file of the checkpoint, open for reading. Raises BadCheckpoint when it is missing or no regular file."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        try:
            # Without O_NONBLOCK, opening a named pipe would wait for its writer for ever.
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise BadCheckpoint(f"{path} cannot be read: {error.strerror}") from None
        status = os.fstat(self.fd)
        self._stamp = stamp_of(status)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise BadCheckpoint(f"{path} is not a regular file")

    def read_into(self, offset: int, into: memoryview) -> None:
        try:
            count = read_fully(self.fd, into, offset)
        except OSError as error:
            raise SourceChanged(f"{self.path} cannot be read any more: {error.strerror}") from None
        if count < len(into):
            raise SourceChanged(f"{self.path} was cut while it was being published; publish again when it is complete")

    def check(self) -> None:
        if not file_stamp(self.fd) == self._stamp == file_stamp(self.path):
            raise SourceChanged(
                f"{self.path} was changed while it was being published; publish again when it is complete"
            )

    def close(self) -> None:
        os.close(self.fd)


def open_folder(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, every head read and checked. Raises BadCheckpoint."""
    if not folder.is_dir():
        raise BadCheckpoint(
            f"{folder} is not a folder; give the folder that holds config.json and the .safetensors files"
        )
    single, index = (folder / SINGLE).exists(), (folder / INDEX).exists()
    if not single and not index:
        raise BadCheckpoint(f"{folder} has neither {SINGLE} nor {INDEX}; only safetensors checkpoints are published")
    expected = _weight_map(folder / INDEX) if index else None
    names = sorted(set(expected.values())) if expected is not None else [SINGLE]
    if single and SINGLE not in names:
        raise BadCheckpoint(f"{folder} has a {SINGLE} that {INDEX} does not name; remove the one that is out of date")
    files, left_out = read_small_files(folder)
    with ExitStack() as cleanup:
        sources: list[FileSource] = []
        for name in names:
            sources.append(FileSource(folder / name))
            cleanup.callback(sources[-1].close)
        checkpoint = Checkpoint(sources, files, left_out)
        if CONFIG in files:
            checkpoint.config = parse_config(files[CONFIG], folder / CONFIG)
        for number, source in enumerate(sources):
            try:
                head = read_head(source.fd, max_head=MAX_SOURCE_HEAD)
            except (TensorFileError, OSError) as error:
                text = error.strerror if isinstance(error, OSError) else str(error)
                raise BadCheckpoint(f"{source.path} is damaged or incomplete: {text}") from None
            checkpoint.add(number, head.tensors, head.data_start)
            checkpoint.metadata = {**head.metadata, **checkpoint.metadata}
        if expected is not None:
            _compare_with_index(checkpoint, expected)
        if not checkpoint.size:
            raise BadCheckpoint(f"{folder} has no tensors")
        cleanup.pop_all()
    return checkpoint


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor -> shard, by the index."""
    found = read_json_object(path).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise BadCheckpoint(f"{path} has no weight_map")
    for tensor, shard in found.items():
        # A bare file name: an index from elsewhere must not make bzstream read /etc or ../..
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise BadCheckpoint(f"{path} gives {shard!r} as the shard of {tensor}, which is no .safetensors file name")
    return found


def _compare_with_index(checkpoint: Checkpoint, expected: Mapping[str, str]) -> None:
    for name, shard in expected.items():
        if name not in checkpoint.places or checkpoint.sources[checkpoint.places[name].source].name != shard:
            raise BadCheckpoint(f"{INDEX} says that the tensor {name} is in {shard}, but it is not")
    for name, place in checkpoint.places.items():
        if name not in expected:
            raise BadCheckpoint(f"the tensor {name} of {checkpoint.sources[place.source].name} is not in {INDEX}")
