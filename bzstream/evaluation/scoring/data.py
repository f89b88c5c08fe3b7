"""The evaluation data as one long run of tokens, mapped from disk, whatever it came as.

`evaluation.data` is one of:
- a tokens file: `.npy` (one dimension, integers), `.safetensors` (one integer tensor of one dimension), or `.bin`
  (raw little-endian integers: 16 bits when the model's vocabulary has at most 65,536 tokens, else 32);
- text: a `.txt`, `.md` or `.jsonl` (its `text` members) file, or a folder of them, taken in the order of their paths;
- the name of a Hugging Face dataset, when the `datasets` library is installed: `name`, `name:split` or
  `name:configuration:split`; its `text` column in order.

Text needs the model's own tokenizer: `evaluation.tokenizer` names a folder that holds one (a Hugging Face
`tokenizer.json`) or is `bytes`, where a token is a UTF-8 byte; a model with a vocabulary of at most 300 reads bytes
unless told otherwise. Documents are joined by the tokenizer's end-of-text token if it has one, and encoding ends after
`evaluation.max_tokens`. The result is kept in the cache folder under a name made of everything it depends on.

Whatever is missing or does not fit is an error before the first submission, not during it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bzstream.evaluation.rejection_codes import EvaluationError
from bzstream.tensorfile import TensorFileError, read_head
from bzstream.util.dtypes import DTYPES

__all__ = ["Tokens", "load_tokens", "require_data"]

_TEXT = (".txt", ".md", ".jsonl")
_PIECE = 1 << 20
"""Characters of a text file encoded at a time, to the next end of line."""
_Numbers = list[int] | NDArray[np.uint8]
_BYTES_VOCABULARY = 300
"""A vocabulary of 256 bytes and a few special tokens."""


class Tokens:
    """A mapped run of token numbers. `name` says what it is; `len()` is the number of tokens."""

    def __init__(self, name: str, values: NDArray[Any], vocabulary: int) -> None:
        if values.ndim != 1 or values.dtype.kind not in "iu":
            raise EvaluationError(f"the evaluation data {name} is not one run of integers; it must have one dimension")
        self.name = name
        self._values = values
        self._vocabulary = vocabulary

    def __len__(self) -> int:
        return len(self._values)

    def windows(self, starts: Iterable[int], length: int) -> NDArray[np.int64]:
        """The windows of `length` tokens that begin at `starts`, as [windows, length].

        Raises EvaluationError when a token is not in the model's vocabulary.
        """
        found = np.stack([self._values[start : start + length].astype(np.int64) for start in starts])
        if found.min() < 0 or found.max() >= self._vocabulary:
            raise EvaluationError(
                f"the evaluation data {self.name} holds token {int(found.max())}, but the model's vocabulary has "
                f"{self._vocabulary}; it was made with another tokenizer"
            )
        return found


def load_tokens(
    data: str | None,
    *,
    vocabulary: int,
    least: int,
    cache: Path,
    tokenizer: str | None = None,
    most: int = 20_000_000,
) -> Tokens:
    """The evaluation data for a model with a vocabulary of `vocabulary` tokens; at least `least` tokens.

    `cache`: folder for encoded text. `most`: tokens after which text is no longer encoded. Raises EvaluationError.
    """
    require_data(data)
    assert data is not None
    path = Path(data)
    try:
        if path.suffix in (".npy", ".bin", ".safetensors"):
            values = _tokens_file(path, vocabulary)
        else:
            values = _text(data, path, vocabulary, cache, tokenizer, most)
    except OSError as error:
        raise EvaluationError(f"the evaluation data {data} cannot be read: {error.strerror or error}") from None
    tokens = Tokens(data, values, vocabulary)
    if len(tokens) < least:
        raise EvaluationError(
            f"the evaluation data {data} has {len(tokens)} tokens, but a score needs {least}; give more data or lower "
            "evaluation.windows or evaluation.window_tokens"
        )
    tokens.windows([0, len(tokens) - min(len(tokens), 4096)], min(len(tokens), 4096))
    return tokens


def require_data(data: str | None) -> None:
    """Whether there is any evaluation data at all, before there is a model to read it for. Raises EvaluationError."""
    if data is None:
        raise EvaluationError("there is no evaluation data; set evaluation.data (or give --data)")
    path = Path(data)
    if path.exists():
        return
    looks_like_a_file = path.is_absolute() or path.suffix in (".npy", ".bin", ".safetensors", *_TEXT)
    if looks_like_a_file or importlib.util.find_spec("datasets") is None:
        hint = "" if looks_like_a_file else "; if it names a Hugging Face dataset, install `datasets`"
        raise EvaluationError(f"the evaluation data {data} does not exist{hint}")


def _tokens_file(path: Path, vocabulary: int) -> NDArray[Any]:
    if path.suffix == ".npy":
        try:
            return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        except ValueError:
            raise EvaluationError(f"the evaluation data {path} is not a .npy file of numbers") from None
    if path.suffix == ".bin":
        kind = np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")
        if path.stat().st_size == 0 or path.stat().st_size % kind.itemsize:
            raise EvaluationError(f"the evaluation data {path} is no whole number of {8 * kind.itemsize}-bit tokens")
        return np.memmap(path, kind, mode="r")
    with path.open("rb") as file:
        try:
            head = read_head(file.fileno())
        except TensorFileError as error:
            raise EvaluationError(f"the evaluation data {path} is not valid safetensors: {error}") from None
    runs = [t for t in head.tensors if len(t.shape) == 1 and np.dtype(DTYPES[t.dtype].numpy or "f4").kind in "iu"]
    if len(runs) != 1 or runs[0].dtype in ("BF16", "F8_E4M3", "F8_E5M2") or not runs[0].shape[0]:
        raise EvaluationError(f"the evaluation data {path} must hold exactly one integer tensor of one dimension")
    run = runs[0]
    return np.memmap(
        path, np.dtype(DTYPES[run.dtype].numpy), mode="r", offset=head.data_start + run.start, shape=run.shape
    )


def _text(data: str, path: Path, vocabulary: int, cache: Path, tokenizer: str | None, most: int) -> NDArray[Any]:
    encode, separator, identity = _encoder(tokenizer, vocabulary)
    if path.exists():
        files = sorted(p for p in path.rglob("*") if p.suffix in _TEXT) if path.is_dir() else [path]
        if not files or (path.is_file() and path.suffix not in _TEXT):
            raise EvaluationError(
                f"the evaluation data {data} is neither tokens (.npy, .bin, .safetensors) nor text ({', '.join(_TEXT)})"
            )
        stamps = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        documents: Iterator[tuple[str, bool]] = (piece for file in files for piece in _documents(file))
    else:
        stamps = [(data, 0, 0)]
        documents = _dataset(data)
    key = hashlib.sha256(json.dumps([stamps, identity, most, vocabulary]).encode()).hexdigest()[:24]
    kept = cache / f"tokens-{key}.npy"
    if not kept.exists():
        cache.mkdir(parents=True, exist_ok=True)
        values = np.concatenate([np.zeros(0, np.uint32), *_encode(documents, encode, separator, most)])[:most]
        draft = cache / f"tokens-{key}.{os.getpid()}.tmp"
        with draft.open("wb") as file:
            np.save(file, values)
        draft.rename(kept)
    return np.asarray(np.load(kept, mmap_mode="r", allow_pickle=False))


def _encode(
    documents: Iterable[tuple[str, bool]], encode: Callable[[str], _Numbers], separator: list[int], most: int
) -> Iterator[NDArray[np.uint32]]:
    """The tokens of (piece of a document, whether it is the last), until there are `most`."""
    total = 0
    for text, last in documents:
        numbers = np.concatenate([np.asarray(encode(text), np.uint32), np.asarray(separator * last, np.uint32)])
        yield numbers
        total += len(numbers)
        if total >= most:
            return


def _encoder(tokenizer: str | None, vocabulary: int) -> tuple[Callable[[str], _Numbers], list[int], str]:
    """(text -> tokens, tokens between documents, what names this encoding in the cache)."""
    if tokenizer == "bytes" or (tokenizer is None and vocabulary <= _BYTES_VOCABULARY):
        if vocabulary < 256:
            raise EvaluationError(
                f"the model has a vocabulary of {vocabulary}, too small for bytes; give a tokens file"
            )
        return lambda text: np.frombuffer(text.encode(), np.uint8), [], "bytes"
    if tokenizer is None:
        raise EvaluationError(
            "the evaluation data is text, but no tokenizer is known; set evaluation.tokenizer to the model's folder"
        )
    file = Path(tokenizer) / "tokenizer.json" if Path(tokenizer).is_dir() else Path(tokenizer)
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise EvaluationError(f"the tokenizer {file} cannot be read: {error.strerror}") from None
    from tokenizers import Tokenizer  # of the evaluator's extra: transformers needs it too

    try:
        loaded: Any = Tokenizer.from_str(raw.decode("utf-8"))
    except Exception:  # the library raises bare Exceptions
        raise EvaluationError(f"the tokenizer {file} is not a tokenizer.json of Hugging Face") from None
    ends = (loaded.token_to_id(token) for token in ("<|endoftext|>", "</s>", "<|end_of_text|>"))
    separator = [end for end in ends if end is not None][:1]

    def encode(text: str) -> list[int]:
        return list(loaded.encode(text, add_special_tokens=False).ids)

    return encode, separator, hashlib.sha256(raw).hexdigest()


def _documents(file: Path) -> Iterator[tuple[str, bool]]:
    with file.open(encoding="utf-8", errors="replace") as lines:
        if file.suffix != ".jsonl":
            while piece := "".join(lines.readlines(_PIECE)):
                yield piece, False
            yield "", True
            return
        for number, line in enumerate(lines, 1):
            try:
                yield str(json.loads(line)["text"]), True
            except (ValueError, KeyError, TypeError):
                raise EvaluationError(f'{file}, line {number}: not a JSON object with a member "text"') from None


def _dataset(data: str) -> Iterator[tuple[str, bool]]:
    library: Any = importlib.import_module("datasets")
    name, *rest = data.split(":")
    split = rest[-1] if rest else "test"
    try:
        rows = library.load_dataset(name, *rest[:-1], split=split)
    except Exception as error:  # the library raises whatever its back ends raise
        raise EvaluationError(f"the evaluation data {data} is no file and no dataset: {error}") from None
    if "text" not in rows.column_names:
        raise EvaluationError(f"the dataset {data} has no column `text`")
    return ((str(row["text"]), True) for row in rows)
