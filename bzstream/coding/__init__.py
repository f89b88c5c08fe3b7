"""Lossless coding of a unit's chunks: bf16 weights in two thirds of their bytes, a version's successor in a third.

`Encoder` makes the coded form of a chunk, alone or as the difference to the same chunk of an earlier version (the
base); `Decoder` writes the chunk back into memory that the caller owns. Nothing depends on either being right: whoever
decodes compares the chunk with its hash in the manifest. The form is described to the bit in docs/coding.md.

May import: `errors`, `tensorfile`. Knows nothing of files, manifests and HTTP, so both the node, which writes coded
files, and the client, which must not import `model`, use it. Imports numpy and zstandard.
"""

from bzstream.coding.decode import Decoder
from bzstream.coding.encode import Encoder
from bzstream.coding.form import MAX_CHUNK, NAME, CodingError
from bzstream.coding.layout import Layout

__all__ = ["MAX_CHUNK", "NAME", "CodingError", "Decoder", "Encoder", "Layout"]
