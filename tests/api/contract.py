"""The contract, a second time: a small model written from the page, not from the code, that says what must be answered.

`World` knows what the node knows (the files of its store, its chain, what it accepted); `World.want` goes through the
contract's order of checks for one `Ask` and returns the first answer that it finds. Nothing here imports `bzstream`
but for the signing of bodies.
"""

from __future__ import annotations

import email.parser
import email.policy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bzstream.chain.keys import Key
from tests.api.desk import signed
from tests.nodes import TOKEN

Pair = tuple[int | None, int | None]
"""first-pos and last-pos of one range as written."""


def spans_of(pairs: Sequence[Pair], size: int) -> list[tuple[int, int]]:
    """[start, stop) of what exists of the ranges, merged where they touch, in the order of the first mention."""
    found: list[tuple[int, int]] = []
    for first, last in pairs:
        start = first if first is not None else max(0, size - (last or 0))
        stop = size if last is None or first is None else min(last + 1, size)
        if start >= stop:
            continue
        place = len(found)
        for n, other in reversed(list(enumerate(found))):
            if other[0] <= stop and start <= other[1]:
                start, stop, place = min(start, other[0]), max(stop, other[1]), n
                del found[n]
        found.insert(place, (start, stop))
    return found


def parse_multipart(kind: str, body: bytes) -> list[tuple[str, bytes]]:
    """(Content-Range, content) of each part of a multipart/byteranges body, whose form is checked."""
    assert kind.startswith("multipart/byteranges; boundary=")
    boundary = kind.partition("boundary=")[2].encode()
    pieces = body.split(b"--" + boundary)
    assert (pieces[0], pieces[-1]) == (b"", b"--\r\n")
    found = []
    for piece in pieces[1:-1]:
        head, _, content = piece.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        fields = email.parser.BytesHeaderParser(policy=email.policy.HTTP).parsebytes(head + b"\r\n\r\n")
        assert fields["Content-Type"] == "application/octet-stream"
        assert content.endswith(b"\r\n")
        found.append((str(fields["Content-Range"]), content[:-2]))
    return found


PATHS = {
    "/health": "GET, HEAD",
    "/openapi.json": "GET, HEAD",
    "/model": "GET, HEAD",
    "/model/partial": "GET, HEAD",
    "/model/shared": "GET, HEAD",
    "/model/full": "GET, HEAD",
    "/model/partial/manifest": "GET, HEAD",
    "/model/shared/manifest": "GET, HEAD",
    "/model/full/manifest": "GET, HEAD",
    "/submit": "POST",
    "/scores": "GET, HEAD",
}
"""Path -> Allow. `/submissions/<id>` beside them."""


@dataclass(frozen=True)
class Ask:
    """One request, valid or not."""

    method: str
    path: str
    query: str = ""
    token: str | None = TOKEN
    hotkey: str | None = None
    group: str | None = None
    ranges: tuple[Pair, ...] | None = None
    if_match: str | None = None
    if_none_match: str | None = None
    if_range: str | None = None
    body: bytes | None = None
    chunks: int = 0
    """Bytes in one chunk of the body; 0: with a Content-Length."""
    version: str = "1.1"
    close: bool = False
    flaw: str | None = None

    def raw(self) -> bytes:
        lines = [f"{self.method} {self.path}{self.query} HTTP/{self.version}", "Host: x"]
        texts = {
            "Authorization": None if self.token is None else f"Bearer {self.token}",
            "X-Hotkey": self.hotkey,
            "X-Expert-Group": self.group,
            "If-Match": self.if_match,
            "If-None-Match": self.if_none_match,
            "If-Range": self.if_range,
            "Connection": "close" if self.close else None,
        }
        lines += [f"{name}: {text}" for name, text in texts.items() if text is not None]
        if self.ranges is not None:
            written = ",".join("-".join("" if p is None else str(p) for p in pair) for pair in self.ranges)
            lines.append(f"Range: bytes={written}")
        body = self.body or b""
        if self.body is not None and self.chunks:
            lines.append("Transfer-Encoding: chunked")
            cut = [self.body[at : at + self.chunks] for at in range(0, len(self.body), self.chunks)]
            body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in cut) + b"0\r\n\r\n"
        elif self.body is not None:
            lines.append(f"Content-Length: {len(self.body)}")
        lines += {"folded": [" x"], "no colon": ["x"], "two hosts": ["Host: y"], "both": [
            "Content-Length: 1", "Transfer-Encoding: chunked"]}.get(self.flaw or "", [])  # fmt: skip
        end = "\n" if self.flaw == "bare LF" else "\r\n"
        return (end.join(lines) + end * 2).encode() + body

    @property
    def has_body(self) -> bool:
        return bool(self.body) or (self.body is not None and self.chunks > 0)


@dataclass
class Want:
    """What must be answered. None where the contract leaves it open."""

    status: int
    goes_on: bool | None = True
    body: bytes | None = None
    fields: dict[str, str] = field(default_factory=dict)
    parts: list[tuple[str, bytes]] | None = None
    json: Any = None


@dataclass
class Entry:
    """An accepted submission."""

    signed: dict[str, object]
    submission_id: str = ""
    superseded: bool = False


class Stop(Exception):
    """The first check that fails."""

    def __init__(self, status: int, goes_on: bool | None = True, **fields: str) -> None:
        self.want = Want(status, goes_on, fields={name.replace("_", "-"): text for name, text in fields.items()})


class World:
    """What the node knows."""

    def __init__(
        self, store: Path, published: Sequence[tuple[str, int]], full: dict[str, bytes], validator: Key
    ) -> None:
        """`published`: (version, block), the current one last. `full`: the whole model of each version."""
        self.versions = dict(published)
        self.current = published[-1][0]
        self.groups = range(4)
        self.store = store
        self.full = full
        self.etags: dict[tuple[str, int | None, str], str] = {}
        """(kind, group, version) -> ETag of the enveloped body: the page does not say how it is made."""
        self.validator = validator
        self.tokens: dict[str, str | None] = {TOKEN: None}
        """Token -> the hotkey that it is bound to."""
        self.block = 0
        self.miners: list[str] | None = None
        self.entries: list[Entry] = []

    # Units, as the page lays them out.

    def payload(self, kind: str, group: int | None, version: str) -> bytes:
        if kind == "full":
            return self.full[version]
        name = "shared" if group is None else f"group-{group}"
        return (self.store / "snapshots" / version / f"{name}.safetensors").read_bytes()

    def envelope(self, group: int | None, version: str, payload: bytes) -> bytes:
        text = json.dumps(
            {
                "expert_group": group,
                "block_number": self.versions[version],
                "model_version": version,
                "content_hash": "sha256:" + hashlib.sha256(payload).hexdigest(),
            },
            separators=(",", ":"),
        ).encode()
        text += b" " * (-(8 + len(text)) % 4096)
        return len(text).to_bytes(8, "little") + text

    # The order of checks.

    def want(self, ask: Ask) -> Want:
        try:
            want = self._checked(ask)
        except Stop as stop:
            want = stop.want
            if ask.has_body and ask.path != "/submit" and want.status in (400, 403) and want.goes_on:
                want.goes_on = None  # refused by its head alone, and then what its body does is left open
        if ask.version == "1.0" or ask.close:
            want.goes_on = False
        if ask.method == "HEAD":
            want.body = b""
            want.parts = want.json = None
        return want

    def _checked(self, ask: Ask) -> Want:
        if ask.flaw == "bare LF":
            raise Stop(400, False)
        if ask.version[0] != "1":
            raise Stop(505, False)
        if ask.flaw is not None or (ask.version == "1.0" and ask.body is not None and ask.chunks):
            raise Stop(400, False)
        public = ask.path in ("/health", "/openapi.json")
        if not public and ask.token not in self.tokens:
            raise Stop(401, not ask.has_body, www_authenticate="Bearer")
        submission = ask.path.startswith("/submissions/") and ask.path != "/submissions/"
        allow = "GET, HEAD" if submission else PATHS.get(ask.path)
        early = None if ask.has_body else True  # whether the connection goes on then is left open
        if allow is None:
            raise Stop(404, early)
        if ask.method not in allow.split(", "):
            raise Stop(405, early, allow=allow)
        if len(ask.body or b"") > 65536:
            raise Stop(413, False)
        bound = None if public else self.tokens[ask.token or ""]
        if ask.path == "/health":
            return Want(200, json=self._health())
        if ask.path == "/openapi.json":
            return Want(200)
        if ask.path == "/submit":
            return self._submit(ask, bound)
        if ask.path.startswith("/model/"):
            return self._download(ask, bound)
        self._claim(ask)
        if ask.path == "/scores" and (ask.query == "?round=x" or repeated(ask.query)):
            raise Stop(400)
        self._identity(ask, bound)
        if submission:
            return self._status(ask.path.removeprefix("/submissions/"))
        return Want(200) if ask.path == "/model" else self._scores(ask)

    def _claim(self, ask: Ask) -> None:
        if ask.hotkey is not None and not is_hotkey(ask.hotkey):
            raise Stop(400, None if ask.has_body else True)

    def _identity(self, ask: Ask, bound: str | None) -> None:
        if bound is not None and ask.hotkey is not None and ask.hotkey != bound:
            raise Stop(403)

    def _download(self, ask: Ask, bound: str | None) -> Want:
        kind = ask.path.split("/")[2]
        query = [pair.split("=") for pair in ask.query.removeprefix("?").split("&") if pair]
        if kind == "partial" and (ask.group is None or not (ask.group.isdigit() and str(int(ask.group)) == ask.group)):
            raise Stop(400)
        if kind != "full" and ask.hotkey is None:
            raise Stop(400)
        self._claim(ask)
        names = [name for name, _ in query]
        if repeated(ask.query) or (["format", "safetensors"] not in query and "format" in names):
            raise Stop(400)
        self._identity(ask, bound)
        if kind == "full" and bound != self.validator.ss58_address:
            raise Stop(403)
        version = dict(query).get("version", self.current)
        group = int(ask.group or 0) if kind == "partial" else None
        if version not in self.versions or (group is not None and group not in self.groups):
            raise Stop(404)
        payload = self.payload(kind, group, version)
        digest = hashlib.sha256(payload).hexdigest()
        envelope = b"" if kind == "full" else self.envelope(group, version, payload)
        if ask.path.endswith("/manifest"):
            return Want(200, json={"unit": kind, "expert_group": group, "block_number": self.versions[version],
                                   "model_version": version, "content_hash": "sha256:" + digest, "size": len(payload),
                                   "payload_offset": len(envelope)})  # fmt: skip
        bare = kind == "full" or "format" in names
        etag = f'"{digest}"' if bare else self.etags[kind, group, version]
        want = self._selected(ask, payload if bare else envelope + payload, etag)
        if want.status in (200, 206):
            want.fields |= {
                "x-block-number": str(self.versions[version]),
                "x-model-version": version,
                "x-content-hash": "sha256:" + digest,
                "accept-ranges": "bytes",
                "cache-control": "no-cache, no-transform",
            }
            if group is not None:
                want.fields["x-expert-group"] = str(group)
        return want

    def _selected(self, ask: Ask, body: bytes, etag: str) -> Want:
        """Conditions, then ranges."""
        if ask.if_match is not None and ask.if_match not in ("*", etag):
            raise Stop(412)
        if ask.if_none_match is not None and ask.if_none_match in ("*", etag, f"W/{etag}"):
            return Want(304, body=b"", fields={"etag": etag})
        fields = {"etag": etag}
        ranges = ask.ranges if ask.method == "GET" and ask.if_range in (None, etag) else None
        if ranges is None or len(ranges) > 16 or any(b is not None and a is not None and b < a for a, b in ranges):
            return Want(200, body=body, fields={**fields, "content-length": str(len(body))})
        spans = spans_of(ranges, len(body))
        if not spans:
            raise Stop(416, content_range=f"bytes */{len(body)}")
        named = [(f"bytes {a}-{b - 1}/{len(body)}", body[a:b]) for a, b in spans]
        if len(spans) > 1:
            return Want(206, parts=named, fields=fields)
        return Want(206, body=named[0][1], fields={**fields, "content-range": named[0][0]})

    # Submissions.

    def _submit(self, ask: Ask, bound: str | None) -> Want:
        self._claim(ask)
        body = read_body(ask.body or b"")
        if body is None:
            raise Stop(400)
        if body["expert_group"] not in self.groups:
            raise Stop(400)
        position = self.block % 420
        if position < 340:
            raise Stop(423)
        if not self.block - position <= body["block_number"] <= self.block:
            raise Stop(400)
        self._identity(ask, bound)
        if bound not in (None, body["hotkey"]) or (self.miners is not None and body["hotkey"] not in self.miners):
            raise Stop(403)
        mine = [entry for entry in self.entries if entry.signed["hotkey"] == body["hotkey"]]
        for entry in mine:
            if entry.signed["block_number"] == body["block_number"]:
                same = {name: body.get(name) for name in SIGNED} == {name: entry.signed.get(name) for name in SIGNED}
                return Want(409, json={"submission_id": entry.submission_id} if same else {})
        if len(mine) >= 3:
            raise Stop(429, retry_after=str((420 - position) * 12))
        return Want(202, json={"status": "accepted"})

    def accepted(self, ask: Ask, submission_id: str) -> None:
        """Tell the model of a 202."""
        body = read_body(ask.body or b"")
        assert body is not None
        for entry in self.entries:
            entry.superseded |= entry.signed["hotkey"] == body["hotkey"]
        self.entries.append(Entry(body, submission_id))

    def _status(self, submission_id: str) -> Want:
        for entry in self.entries:
            if entry.submission_id == submission_id:
                told = ("rejected", "superseded", 0.0) if entry.superseded else ("queued", None, None)
                named = {name: entry.signed[name] for name in ("hotkey", "expert_group", "block_number")}
                return Want(200, json={**dict(zip(("status", "reason", "score"), told, strict=True)), **named})
        raise Stop(404)

    def _scores(self, ask: Ask) -> Want:
        counting = [entry.submission_id for entry in self.entries if not entry.superseded]
        if ask.query != "?round=12520" or not counting:
            raise Stop(404)  # nothing is ever scored here
        return Want(200, json={"round": 12520, "ids": counting})

    def _health(self) -> dict[str, object]:
        position = self.block % 420
        phase = (
            "distribute" if position < 20 else "train" if position < 320 else "commit" if position < 340 else "submit"
        )
        return {"status": "healthy", "model_loaded": True, "current_block": self.block, "phase": phase}


def repeated(query: str) -> bool:
    """Whether a parameter comes more than once."""
    names = [pair.partition("=")[0] for pair in query.removeprefix("?").split("&")]
    return len(set(names)) != len(names)


SIGNED = ("hotkey", "expert_group", "checkpoint_url", "block_number", "checkpoint_hash")
_GOOD: dict[bytes, dict[str, Any]] = {}


def good_body(key: Key, block: int, group: int) -> bytes:
    """A body that its hotkey signed; the model remembers that it did, and so needs no cryptography."""
    body = signed(key, block, expert_group=group)
    raw = json.dumps(body).encode()
    _GOOD[raw] = body
    return raw


def read_body(raw: bytes) -> dict[str, Any] | None:
    """The fields of a body that is good; None for any other, for all that the tests send others."""
    return _GOOD.get(raw)


_HOTKEYS: set[str] = set()


def is_hotkey(text: str) -> bool:
    """Whether it is one of the tests' hotkeys."""
    return text in _HOTKEYS


def known(key: Key) -> Key:
    """Tell the model of a hotkey."""
    _HOTKEYS.add(key.ss58_address)
    return key
