"""Hand in a checkpoint: build the signed body, send it until an answer is sure, follow what becomes of it.

Sending again is safe: the body is the same to the last byte, (hotkey, block) counts once for ever, and a 409 for the
identical signed body carries the submission's id. So a lost answer is asked for again, and such a 409 is success.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bzstream.chain.keys import Key, load_key
from bzstream.client.errors import (
    DiskError,
    ProtocolViolation,
    Refused,
    UsageError,
)
from bzstream.client.session import Session
from bzstream.client.session_factory import MAX_GROUP, Options, open_session
from bzstream.client.tuning import Tuning
from bzstream.util.files import hash_file

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
    TransientError when no sure answer came, and KeyUnavailable.
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
            fields["checkpoint_hash"] = _checkpoint_hash(checkpoint)
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

    Raises Refused, and TransientError when the node does not answer for `patience_s`.
    """
    if not _ID_FORM.fullmatch(submission_id):
        raise UsageError("that is not the id of a submission")
    session = _open(url, token, ca_file, None, tuning)
    path = f"/submissions/{submission_id}"
    seen = ""
    try:
        while True:
            data = session.request_with_retries("GET", path, patience_s=patience_s)
            try:
                status = msgspec.json.decode(data[1], type=SubmissionStatus)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                raise ProtocolViolation("the node's answer about the submission is malformed") from None
            if status.status not in _STATES:
                raise ProtocolViolation(f"the node reports a state that does not exist: {status.status!r:.40}")
            if status.status != seen:
                seen = status.status
                yield status
            if status.final:
                return
            session.stopping.wait(every_s)
    finally:
        session.close()


def _checkpoint_hash(path: Path) -> str:
    """`sha256:<hex>` of a file. Raises DiskError."""
    try:
        return f"sha256:{hash_file(path)}"
    except OSError as error:
        raise DiskError(f"the checkpoint {path} cannot be read: {error.strerror}") from None


def _open(
    url: str, token: str | None, ca_file: str | None, notify: Callable[[str], None] | None, tuning: Tuning | None
) -> Session:
    options = Options(token=token, ca_file=ca_file)
    return open_session(url, options, tuning or Tuning(), notify, claim_needed=False)


def _current_block(session: Session, patience_s: float) -> int:
    data = session.request_with_retries("GET", "/health", patience_s=patience_s)[1]
    try:
        return msgspec.json.decode(data, type=_Health).current_block
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise ProtocolViolation("the node's /health is malformed; give the block number yourself") from None


def _send(session: Session, body: bytes, patience_s: float) -> tuple[_Accepted, bool]:
    """The node's word that it has the submission, and whether it had it before."""
    try:
        status, data = session.request_with_retries("POST", "/submit", body, patience_s=patience_s)
    except Refused as refused:
        if refused.status == 409 and _ID_FORM.fullmatch(refused.submission_id):
            return _Accepted(refused.submission_id), True
        raise
    if status != 202:
        raise ProtocolViolation(f"the node answered {status} to a submission, which means nothing")
    try:
        accepted = msgspec.json.decode(data, type=_Accepted)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise ProtocolViolation("the node accepted the submission but its answer is malformed") from None
    if not _ID_FORM.fullmatch(accepted.submission_id):
        raise ProtocolViolation("the node accepted the submission but its id is malformed")
    return accepted, False
