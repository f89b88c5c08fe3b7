"""The simulated chain: a small JSON file that says what block it is and who is registered.

    {"block": 12345, "block_seconds": 0, "validators": ["5F..."], "miners": null}
`block_seconds` 0 freezes the block, a number lets it run from the moment of reading; `miners` null lets any hotkey
submit. Only `block` must be there. Every `observe` reads the file again and compares its bytes: it is small, and a
comparison of times misses two writes within one tick. A file that cannot be read, is half written or is not valid
leaves the last good one in force, and is reported once. The chain role uses it, from its event loop.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bzstream.chain.canonical import MAX_INTEGER
from bzstream.chain.clock import Cycle
from bzstream.chain.ss58 import is_hotkey
from bzstream.chain.state import ChainState
from bzstream.errors import BzstreamError
from bzstream.util.strict_json import JsonError, parse_json_object
from bzstream.util.warn_once import WarnOnce

__all__ = ["ChainFile", "InvalidChainFile", "SimulatedChain", "block_hash", "parse_chain_file"]

MAX_FILE = 4 * 1024 * 1024
"""Bytes; 60,000 hotkeys. A subnet has 256."""
_MEMBERS = frozenset({"block", "block_seconds", "validators", "miners"})


class InvalidChainFile(BzstreamError):
    """The chain file cannot be read or does not say what a chain file says."""


@dataclass(frozen=True, slots=True)
class ChainFile:
    """What a chain file says."""

    block: int
    block_seconds: float = 0.0
    validators: frozenset[str] = frozenset()
    miners: frozenset[str] | None = None


def block_hash(block: int) -> str:
    """The simulated chain's hash of a block: 64 hex digits of the SHA-256 of `bzstream-sim-<block>`."""
    return hashlib.sha256(f"bzstream-sim-{block}".encode("ascii")).hexdigest()


def parse_chain_file(raw: bytes) -> ChainFile:
    """Read the text of a chain file strictly: types, ranges, names, no duplicates. Raises InvalidChainFile."""
    try:
        document = parse_json_object(raw, max_bytes=MAX_FILE)
    except JsonError as error:
        raise InvalidChainFile(f'{error}; it must be an object such as {{"block": 12345}}') from None
    if unknown := sorted(document.keys() - _MEMBERS):
        raise InvalidChainFile(f"it has an unknown member {unknown[0]!r}; known are {', '.join(sorted(_MEMBERS))}")
    if "block" not in document:
        raise InvalidChainFile('"block" is missing')
    block = document["block"]
    if type(block) is not int or not 0 <= block <= MAX_INTEGER:
        raise InvalidChainFile('"block" must be a whole number, 0 or more')
    seconds = document.get("block_seconds", 0)
    if type(seconds) not in (int, float) or not 0 <= seconds <= 86_400:  # NaN fails both comparisons
        raise InvalidChainFile('"block_seconds" must be a number of seconds from 0 to 86400')
    miners = document.get("miners")
    return ChainFile(
        block,
        float(seconds),
        _hotkeys(document.get("validators", []), "validators"),
        None if miners is None else _hotkeys(miners, "miners"),
    )


def _hotkeys(value: object, name: str) -> frozenset[str]:
    if not isinstance(value, list):
        raise InvalidChainFile(f'"{name}" must be a list of SS58 hotkeys')
    for hotkey in value:
        if not is_hotkey(hotkey):
            raise InvalidChainFile(f'"{name}" lists {hotkey!r:.60}, which is not an SS58 hotkey')
    if len(set(value)) != len(value):
        raise InvalidChainFile(f'"{name}" lists a hotkey twice')
    return frozenset(value)


class SimulatedChain:
    """The chain that a file describes."""

    def __init__(self, file: Path, cycle: Cycle, warn: Callable[[str], None]) -> None:
        """`warn` gets one sentence when the file turns unusable, and again only after it was good in between."""
        self._file = file
        self._cycle = cycle
        self._warning = WarnOnce(warn)
        self._good: ChainFile | None = None
        self._good_raw: bytes | None = None
        self._bad_raw: bytes | None = None
        self._read_at = 0.0

    def observe(self, wall: float, monotonic: float) -> ChainState | None:
        """The state now, from the last good file; None when there was none yet.

        `wall`: seconds since the epoch. `monotonic`: seconds of a clock that never jumps, which moves the blocks.
        """
        self._refresh(monotonic)
        good = self._good
        if good is None:
            return None
        passed = math.floor((monotonic - self._read_at) / good.block_seconds) if good.block_seconds else 0
        block = good.block + passed
        return ChainState(
            block=block,
            observed_at=wall,
            validators=good.validators,
            miners=good.miners,
            frozen=not good.block_seconds,
            hashes={seed: block_hash(seed) for seed in self._cycle.recent_seeds(block)},
        )

    def _refresh(self, monotonic: float) -> None:
        try:
            with self._file.open("rb") as stream:
                raw = stream.read(MAX_FILE + 1)
            if raw == self._good_raw:
                self._warning.succeeded()
                return
            if raw == self._bad_raw:
                return
            parsed = parse_chain_file(raw)
        except OSError as error:
            self._complain(f"it cannot be read: {error.strerror}")
        except InvalidChainFile as error:
            self._bad_raw = raw
            self._complain(str(error))
        else:
            self._good, self._good_raw = parsed, raw
            self._read_at = monotonic
            self._warning.succeeded()

    def _complain(self, reason: str) -> None:
        kept = "no chain is known yet" if self._good is None else "the last good one stays in force"
        self._warning.failed(f"the chain file {self._file} is not usable, {kept}: {reason}")
