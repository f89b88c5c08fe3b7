"""Hand in a checkpoint: build the signed body, send it until an answer is sure, follow what becomes of it.

Sending again is safe: the body is the same to the last byte, (hotkey, block) counts once for ever, and a 409 for the
identical signed body carries the submission's id. So a lost answer is asked for again, and such a 409 is success.
"""

from __future__ import annotations

import hashlib
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bzstream.chain.keys import Key, load_key
from bzstream.client.entry import MAX_GROUP, Options, UsageError, open_session
from bzstream.client.errors import ClientError, DiskTrouble, Misbehaved, Passing, Refused, Stopped
from bzstream.client.session import Session, refusal
from bzstream.client.tuning import Tuning

__all__ = ["SubmissionReport", "SubmissionStatus", "follow", "submit"]

_ID_FORM = re.compile(r"[0-9A-Za-z-]{1,64}", re.ASCII)
FINAL = frozenset({"scored", "rejected", "failed"})
_STATES = FINAL | {"queued", "fetching", "verifying", "evaluating"}


class _Health(msgspec.Struct):
    current_block: int
    phase: str = ""


class _Accepted(msgspec.Struct):
    submission_id: str
    evaluation_eta_blocks: int | None = None


@dataclass(frozen=True, slots=True)
class SubmissionReport:
    """An accepted submission. `already`: the node had it before this call, from an answer that was lost."""

    submission_id: str
    hotkey: str
    expert_group: int
    block_number: int
    checkpoint_hash: str | None
    evaluation_eta_blocks: int | None
    already: bool


class SubmissionStatus(msgspec.Struct, frozen=True):
    """What GET /submissions/{id} says."""

    submission_id: str
    status: str
    reason: str | None = None
    baseline_loss: float | None = None
    loss: float | None = None
    score: float | None = None

    @property
    def final(self) -> bool:
        return self.status in FINAL


def submit(
    url: str,
    *,
    key: str | Key,
    group: int,
    checkpoint_url: str,
    block: int | None = None,
    checkpoint: Path | None = None,
    token: str | None = None,
    ca_file: str | None = None,
    patience_s: float = 60.0,
    notify: Callable[[str], None] | None = None,
    tuning: Tuning | None = None,
) -> SubmissionReport:
    """Submit the checkpoint behind `checkpoint_url` for an expert group, signed by `key` (a key, key file or wallet).

    `block`: the block at which the training cycle ended, default the node's current one. `checkpoint`: the file behind
    the URL; its SHA-256 is signed too, which proves that this hotkey had it at this moment. An answer that does not
    come is asked for again for `patience_s` seconds.

    Raises Refused (status and code say why: 423 not the submit phase, 409 another submission for this block, ...),
    Passing when no sure answer came, and KeyUnavailable.
    """
    if not 0 <= group <= MAX_GROUP:
        raise UsageError(f"{group} is not the number of a group")
    signer = load_key(key) if isinstance(key, str) else key
    session = _open(url, token, ca_file, notify, tuning)
    try:
        if block is None:
            block = _current_block(session, patience_s)
        fields: dict[str, object] = {
            "block_number": block,
            "checkpoint_url": checkpoint_url,
            "expert_group": group,
            "hotkey": signer.ss58_address,
        }
        if checkpoint is not None:
            fields["checkpoint_hash"] = hash_file(checkpoint)
        body = msgspec.json.encode({**fields, "signature": signer.sign_fields(fields)})
        accepted, already = _send(session, body, patience_s)
    finally:
        session.close()
    return SubmissionReport(
        submission_id=accepted.submission_id,
        hotkey=signer.ss58_address,
        expert_group=group,
        block_number=block,
        checkpoint_hash=str(fields["checkpoint_hash"]) if checkpoint is not None else None,
        evaluation_eta_blocks=accepted.evaluation_eta_blocks,
        already=already,
    )


def follow(
    url: str,
    submission_id: str,
    *,
    token: str | None = None,
    ca_file: str | None = None,
    every_s: float = 2.0,
    patience_s: float = 300.0,
    tuning: Tuning | None = None,
) -> Iterator[SubmissionStatus]:
    """Each state of a submission as the node reports it, the final one last; waits in between.

    Raises Refused, and Passing when the node does not answer for `patience_s`.
    """
    if not _ID_FORM.fullmatch(submission_id):
        raise UsageError("that is not the id of a submission")
    session = _open(url, token, ca_file, None, tuning)
    path = f"{session.mirrors[0].address.prefix}/submissions/{submission_id}"
    seen = ""
    try:
        while True:
            data = _patiently(session, "GET", path, b"", patience_s)
            try:
                status = msgspec.json.decode(data[1], type=SubmissionStatus)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                raise Misbehaved("the node's answer about the submission is malformed") from None
            if status.status not in _STATES:
                raise Misbehaved(f"the node reports a state that does not exist: {status.status!r:.40}")
            if status.status != seen:
                seen = status.status
                yield status
            if status.final:
                return
            session.stopping.wait(every_s)
    finally:
        session.close()


def hash_file(path: Path) -> str:
    """`sha256:<hex>` of a file. Raises DiskTrouble."""
    try:
        with path.open("rb") as stream:
            return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DiskTrouble(f"the checkpoint {path} cannot be read: {error.strerror}") from None


def _open(
    url: str, token: str | None, ca_file: str | None, notify: Callable[[str], None] | None, tuning: Tuning | None
) -> Session:
    options = Options(token=token, ca_file=ca_file)
    return open_session(url, options, tuning or Tuning(), notify, claim_needed=False)


def _current_block(session: Session, patience_s: float) -> int:
    data = _patiently(session, "GET", f"{session.mirrors[0].address.prefix}/health", b"", patience_s)[1]
    try:
        return msgspec.json.decode(data, type=_Health).current_block
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise Misbehaved("the node's /health is malformed; give the block number yourself") from None


def _send(session: Session, body: bytes, patience_s: float) -> tuple[_Accepted, bool]:
    """The node's word that it has the submission, and whether it had it before."""
    path = f"{session.mirrors[0].address.prefix}/submit"
    try:
        status, data = _patiently(session, "POST", path, body, patience_s)
    except Refused as refused:
        if refused.status == 409 and _ID_FORM.fullmatch(refused.submission_id):
            return _Accepted(refused.submission_id), True
        raise
    if status != 202:
        raise Misbehaved(f"the node answered {status} to a submission, which means nothing")
    try:
        accepted = msgspec.json.decode(data, type=_Accepted)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise Misbehaved("the node accepted the submission but its answer is malformed") from None
    if not _ID_FORM.fullmatch(accepted.submission_id):
        raise Misbehaved("the node accepted the submission but its id is malformed")
    return accepted, False


def _patiently(session: Session, method: str, path: str, body: bytes, patience_s: float) -> tuple[int, bytes]:
    """One request, made again while there is no answer or a request to come back later."""
    mirror = session.mirrors[0]
    fields = [("Content-Type", "application/json")] if body else []
    deadline = time.monotonic() + patience_s
    pause = 0.2
    while True:
        error: ClientError
        try:
            reply, data = session.document(mirror, method, path, fields, body)
            if 200 <= reply.status < 300:
                return reply.status, data
            error = refusal(reply, data, mirror.address, "the submission")
            if reply.status == 429 and body:
                # Not a busy server: this hotkey has had its share of the cycle, and waiting does not change that.
                error = Refused(str(error).replace("is busy or not ready", "takes no more submissions"), 429)
        except Passing as passing:
            error = passing
        if not isinstance(error, Passing) or (error.retry_after or 0.0) > patience_s:
            raise error
        wait = max(error.retry_after or 0.0, pause * random.uniform(0.5, 1.5))
        if time.monotonic() + wait > deadline:
            raise error
        session.notify(f"{error}; trying again")
        if session.stopping.wait(wait):
            raise Stopped("stopped before the node gave a sure answer; the same call asks again")
        pause = min(2 * pause, 5.0)
