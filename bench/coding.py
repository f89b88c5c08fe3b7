"""How many bytes the coding of chunks saves, and what it costs, beside zstd, blosc2 and zipnn.

    python -m bench.coding [--quick] [--json FILE] [--corpus FOLDER]

Every version of `bench.corpus` (real training), and one of Gaussian noise with a Gaussian step, is coded chunk by
chunk, alone and as the difference to the version before it. The peers get the same chunks. None of them knows
differences, so they are handed the bytes that serve them best: zstd and blosc2 the integer difference, zipnn the XOR
that its authors describe.

Speeds are GB of plain bytes for each second of CPU time of this process, so a busy machine disturbs them
little; each is the median of some rounds, in which all take turns. Decoding writes into memory that is there already.
`--quick` trains little and measures once. `--corpus` keeps the trained versions for the next run.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import blosc2
import numpy as np
import numpy.typing as npt
import zipnn
import zstandard

from bench.command import command
from bench.corpus import RATES, make_corpus
from bench.rows import row_of
from bzstream.coding import Decoder, Encoder, Layout
from bzstream.tensorfile import parse_head

__all__ = ["measure_all"]

CHUNK = 8 << 20
ROUNDS = 5
GAUSSIAN_ELEMENTS, SPREAD, STEP = 8 << 20, 0.02, 1e-4

RATIO_TARGETS = {
    "start": "<= 0.67", "outer": "<= 0.36", "1e-4-after-10": "<= 0.34", "1e-5-after-10": "<= 0.17",
}  # fmt: skip
FRESH_SPEEDS, DIFFERENCE_SPEEDS = (">= 0.6", ">= 1.0"), (">= 0.4", ">= 0.6")
"""Encoding, decoding; GB/s a core."""


class Piece(NamedTuple):
    """One chunk, the same chunk of the version before it, and the layout of both."""

    chunk: bytes
    base: bytes | None
    layout: Layout
    start: int


class Coder(NamedTuple):
    name: str
    encode: Callable[[Piece], bytes]
    decode: Callable[[bytes, Piece, bytearray], None]


def ours() -> Coder:
    encoder, decoder = Encoder(), Decoder()

    def encode(piece: Piece) -> bytes:
        spans = piece.layout.between(piece.start, piece.start + len(piece.chunk))
        return encoder.encode(piece.chunk, spans, piece.base) or piece.chunk

    return Coder("bzstream", encode, lambda coded, piece, out: decoder.decode(coded, out, piece.base))


def words(data: bytes) -> npt.NDArray[np.uint16]:
    return np.frombuffer(data, "<u2", len(data) // 2)


def subtract(piece: Piece) -> bytes:
    """The chunk, or its difference to the base as 16-bit integers. All chunks of this bench have even sizes."""
    return piece.chunk if piece.base is None else (words(piece.chunk) - words(piece.base)).tobytes()


def add(data: bytes, piece: Piece, out: bytearray) -> None:
    if piece.base is None:
        out[:] = data
    else:
        np.add(words(data), words(piece.base), out=np.frombuffer(out, "<u2"))


def zstd(level: int) -> Coder:
    compressor, decompressor = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
    return Coder(
        f"zstd -{level}",
        lambda piece: compressor.compress(subtract(piece)),
        lambda coded, piece, out: add(decompressor.decompress(coded), piece, out),
    )


def blosc() -> Coder:
    parameters = blosc2.CParams(
        codec=blosc2.Codec.ZSTD, clevel=1, typesize=2, nthreads=1, filters=[blosc2.Filter.SHUFFLE]
    )
    blosc2.set_nthreads(1)
    return Coder(
        "blosc2",
        lambda piece: bytes(blosc2.compress2(subtract(piece), cparams=parameters)),
        lambda coded, piece, out: add(blosc2.decompress2(coded, nthreads=1), piece, out),
    )


def zip_nn() -> Coder:
    coder = zipnn.ZipNN(bytearray_dtype="bfloat16", threads=1)

    def encode(piece: Piece) -> bytes:
        plain = piece.chunk if piece.base is None else (words(piece.chunk) ^ words(piece.base)).tobytes()
        return bytes(coder.compress(bytearray(plain)))  # it writes into what it is given

    def decode(coded: bytes, piece: Piece, out: bytearray) -> None:
        plain = coder.decompress(coded)
        if piece.base is None:
            out[:] = plain
        else:
            np.bitwise_xor(words(plain), words(piece.base), out=np.frombuffer(out, "<u2"))

    return Coder("zipnn", encode, decode)


def pieces(payload: bytes, base: bytes | None) -> Iterator[Piece]:
    layout = Layout.of_file(parse_head(payload, len(payload)))
    for start in range(0, len(payload), CHUNK):
        end = start + CHUNK
        yield Piece(payload[start:end], None if base is None else base[start:end], layout, start)


def gaussian() -> Iterator[Piece]:
    """Noise as weights and a step of noise: what a coder's authors often measure."""
    generator = np.random.default_rng(0)
    before = (generator.standard_normal(GAUSSIAN_ELEMENTS) * SPREAD).astype(np.float32)
    after = before + (generator.standard_normal(GAUSSIAN_ELEMENTS) * STEP).astype(np.float32)
    first, second = ((values.view(np.uint32) >> 16).astype("<u2").tobytes() for values in (before, after))
    layout = Layout.of_dtype("BF16", len(first))
    for base in (None, first):
        for start in range(0, len(second), CHUNK):
            end = start + CHUNK
            yield Piece(second[start:end], None if base is None else base[start:end], layout, start)


def measure(coder: Coder, data: list[Piece]) -> tuple[float, float, float]:
    """Share of the plain bytes, GB/s of encoding and of decoding. What is decoded is compared."""
    plain = sum(len(piece.chunk) for piece in data)
    coded_bytes, encode_s, decode_s = 0, 0.0, 0.0
    for piece in data:
        out = bytearray(b"\x01") * len(piece.chunk)
        began = time.process_time()
        coded = coder.encode(piece)
        encode_s += time.process_time() - began
        began = time.process_time()
        coder.decode(coded, piece, out)
        decode_s += time.process_time() - began
        assert out == piece.chunk, f"{coder.name} did not give the chunk back"
        coded_bytes += len(coded)
    return coded_bytes / plain, plain / encode_s / 1e9, plain / decode_s / 1e9


def compare(title: str, data: list[Piece], rounds: int, *, ratio_target: str = "", judged: bool = False) -> list[Any]:
    """The rows of one set of chunks: share, encoding and decoding, of all coders in turn."""
    coders = [ours(), zstd(1), zstd(3), blosc(), zip_nn()]
    found: dict[str, list[tuple[float, float, float]]] = {coder.name: [] for coder in coders}
    for _ in range(rounds):
        for coder in coders:
            found[coder.name].append(measure(coder, data))
    encode_target, decode_target = FRESH_SPEEDS if data[0].base is None else DIFFERENCE_SPEEDS
    targets = (ratio_target, encode_target if judged else "", decode_target if judged else "")
    columns = (("bytes of plain", "x"), ("encode, one core", "GB/s"), ("decode, one core", "GB/s"))
    return [
        row_of(
            f"{title}: {what}",
            unit,
            [values[place] for values in (found[coder.name][:1] if place == 0 else found[coder.name])],
            subject=coder.name,
            target=targets[place] if coder.name == "bzstream" else "",
        )
        for place, (what, unit) in enumerate(columns)
        for coder in coders
    ]


def measure_all(quick: bool = False, corpus: Path | None = None) -> dict[str, Any]:
    """Train, and measure all coders on all versions."""
    rounds = 1 if quick else ROUNDS
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bzstream-bench-") as folder:
        versions = {name: file.read_bytes() for name, file in make_corpus(corpus or Path(folder), quick).items()}
    start = versions.pop("start")
    fresh = list(pieces(start, None))
    rows += compare("fresh", fresh, rounds, ratio_target=RATIO_TARGETS["start"], judged=True)
    order = ("outer", *(name for rate in RATES for name in versions if name.startswith(f"{rate}-")))
    for name in order:
        data = list(pieces(versions[name], start))
        alone = measure(ours(), list(pieces(versions[name], None)))[0]
        title = "outer step" if name == "outer" else "{} steps at {}".format(*reversed(name.split("-after-")))
        found = compare(f"difference, {title}", data, rounds, ratio_target=RATIO_TARGETS.get(name, ""), judged=True)
        rows += found
        against = found[0]["median"] / alone
        rows.append(row_of(f"difference, {title}: against fresh", "x", [against], target="<= 1.0"))
    noise = list(gaussian())
    half = len(noise) // 2
    rows += compare("Gaussian, fresh", noise[:half], rounds)
    rows += compare("Gaussian, difference", noise[half:], rounds)
    return {"rows": rows}


def main() -> None:
    command(
        "coding",
        __doc__,
        measure_all,
        lambda parser: parser.add_argument(
            "--corpus", type=Path, metavar="FOLDER", help="where trained versions are kept for the next run"
        ),
    )


if __name__ == "__main__":
    main()
