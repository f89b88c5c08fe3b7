"""The small files beside the tensors (config.json, the tokenizer's files and the like), kept byte for byte.

They are part of a snapshot so that another validator can hold all of it. Only config.json is understood here, as it
says how experts lie; it is read as Python writes it, with Infinity and NaN where the source has them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from bzstream.model.errors import BadCheckpoint
from bzstream.util.files import read_small_file
from bzstream.util.strict_json import JsonError, parse_json_object

__all__ = ["CONFIG", "FILE_NAME", "MAX_FILES", "parse_config", "read_json_object", "read_small_files"]

CONFIG = "config.json"

FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}\.(?:json|txt|model|jinja)")
"""The contract's form of a small file's name (at most 100 characters with the ending)."""

MAX_FILES = 16 * 1024 * 1024
"""Bytes of all small files of a snapshot, as the contract has it. Qwen3's tokenizer has 11 MB."""

MAX_INDEX = 32 * 1024 * 1024
"""Bytes of one JSON file that is only read. (The index of DeepSeek-V3, with 91,000 tensors, has 9 MB.)"""


def read_small_files(folder: Path) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Name -> content of the folder's small files, and the names of those for which there is no room.

    config.json comes first, then the others by size. Shard indexes are left out: a snapshot has no shards. Raises
    BadCheckpoint when one cannot be read.
    """
    paths = [
        path
        for path in folder.iterdir()
        if FILE_NAME.fullmatch(path.name) and not path.name.endswith(".safetensors.index.json") and path.is_file()
    ]
    found: dict[str, bytes] = {}
    left_out = []
    left = MAX_FILES
    try:
        for path in sorted(paths, key=lambda path: (path.name != CONFIG, path.stat().st_size, path.name)):
            if path.stat().st_size > left and path.name != CONFIG:
                left_out.append(path.name)
                continue
            found[path.name] = read_small_file(path, left)
            left -= len(found[path.name])
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read: {error.strerror}") from None
    return found, tuple(left_out)


def parse_config(content: bytes, name: object = CONFIG) -> dict[str, Any]:
    """What a config.json says. Raises BadCheckpoint with the `name` of the file."""
    try:
        return parse_json_object(content, python_values=True)
    except JsonError as error:
        raise BadCheckpoint(f"{name} cannot be used: {error}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of the checkpoint. Raises BadCheckpoint."""
    try:
        return parse_config(read_small_file(path, MAX_INDEX), path)
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read: {error.strerror}") from None
