"""Checks a POST /submit: what it says, and whether it may be submitted now. Pure; any thread.

    body -> read_body (400) -> decide (503, 400, 423, 400, 403) -> Candidate -> the ledger (409, 429, 202)
The order is the contract's. A refused request is told the first thing that is wrong with it, and the node's state only
if it is well-formed and signed. The http worker calls this; the signature is most of the work.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from bzstream.chain.clock import Cycle
from bzstream.chain.keys import (
    InvalidHotkey,
    InvalidSignature,
    canonical_json,
    decode_hotkey,
    decode_signature,
    verify,
)
from bzstream.chain.state import ChainState
from bzstream.config import SubmitSettings
from bzstream.errors import BzstreamError
from bzstream.submissions.types import Candidate, Duplicate, LimitReached, Submission
from bzstream.submissions.urls import InvalidUrl, check_url
from bzstream.util.strict_json import DuplicateKey, JsonError, parse_json_object

__all__ = ["MAX_BLOCK", "MAX_GROUP", "ChainContext", "SubmissionRefused", "decide", "read_body", "refusal_of"]

MAX_GROUP = 999_999_999
"""As in the X-Expert-Group header: `0` or `[1-9][0-9]{0,8}`."""
MAX_BLOCK = 2**53 - 1
"""The largest integer that the canonical form holds."""

_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,15})", re.ASCII)
_CHECKPOINT_HASH = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)


class SubmissionRefused(BzstreamError):
    """A submission is refused: `status` for HTTP, `code` for programs, `detail` for people.

    `retry_after`: seconds after which the same request may succeed, where that can be said. `signed_text`: of an
    invalid signature, the text that it should be over.
    """

    def __init__(
        self, status: int, code: str, detail: str, retry_after: int | None = None, *, signed_text: str | None = None
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.retry_after = retry_after
        self.signed_text = signed_text


def read_body(raw: bytes, rules: SubmitSettings) -> Submission:
    """Read the body of POST /submit: JSON, fields, hotkey, URL, signature, in this order. Raises SubmissionRefused.

    Unknown fields are ignored. The signature may be over the text as wallets wrap it, `<Bytes>` text `</Bytes>`. Takes
    at most about 0.4 ms for a body of ordinary size, most of it the signature.
    """
    document = _parse(raw)
    hotkey = _text(document, "hotkey")
    group = _integer(document, "expert_group", MAX_GROUP)
    url = _text(document, "checkpoint_url")
    block = _integer(document, "block_number", MAX_BLOCK)
    signature = _text(document, "signature")
    checkpoint_hash = _text(document, "checkpoint_hash") if "checkpoint_hash" in document else None
    try:
        decode_hotkey(hotkey)
    except InvalidHotkey as error:
        raise SubmissionRefused(400, "invalid_hotkey", str(error)) from None
    if checkpoint_hash is not None and not _CHECKPOINT_HASH.fullmatch(checkpoint_hash):
        raise SubmissionRefused(
            400, "invalid_checkpoint_hash", "checkpoint_hash must be sha256: and 64 lower-case hex digits"
        )
    try:
        check_url(url, rules)
    except InvalidUrl as error:
        raise SubmissionRefused(400, error.code, str(error)) from None
    fields: dict[str, object] = {
        "hotkey": hotkey,
        "expert_group": group,
        "checkpoint_url": url,
        "block_number": block,
    }
    if checkpoint_hash is not None:
        fields["checkpoint_hash"] = checkpoint_hash
    signed = canonical_json(fields)
    problem = "the signature is not by hotkey over the text in signed_text"
    try:
        decoded = decode_signature(signature)
        texts = (signed, b"<Bytes>" + signed + b"</Bytes>")
        good = any(verify(hotkey, text, decoded, rules.signature_schemes) for text in texts)
    except InvalidSignature as error:
        good, problem = False, str(error)
    if not good:
        raise SubmissionRefused(400, "invalid_signature", problem, signed_text=signed.decode("utf-8"))
    return Submission(hotkey, group, url, block, checkpoint_hash, signature, signed)


@dataclass(frozen=True, slots=True)
class ChainContext:
    """What the node knows at the moment of a submission."""

    groups: Collection[int] | None
    """Expert groups of the current snapshot; None: no snapshot yet."""
    chain: ChainState | None
    """None: unknown."""
    cycle: Cycle
    stale_s: float
    """`chain.stale_s`."""
    identities: Collection[str] = ()
    """Hotkeys that the caller holds by other evidence, such as the one that its token is bound to."""
    now: float | None = None
    """Seconds since the epoch; None: the clock's."""


def decide(submission: Submission, context: ChainContext, rules: SubmitSettings) -> Candidate:
    """Whether a well-formed submission may go to the ledger now. Raises SubmissionRefused (503, 400, 423, 400, 403)."""
    chain, cycle = context.chain, context.cycle
    if context.groups is None:
        raise SubmissionRefused(503, "model_not_loaded", "no model snapshot is loaded yet; try again later", 10)
    if chain is None:
        raise SubmissionRefused(503, "chain_unknown", "the chain's state is not known yet; try again later", 10)
    if chain.age(context.now) > context.stale_s:
        raise SubmissionRefused(503, "chain_stale", "the node has lost sight of the chain; try again later", 10)
    if submission.expert_group not in context.groups:
        raise SubmissionRefused(400, "unknown_expert_group", f"expert group {submission.expert_group} does not exist")
    phase = cycle.phase(chain.block)
    if phase != "submit":
        wait = cycle.round(chain.block) - chain.block
        wait = wait if wait > 0 else wait + cycle.length
        raise SubmissionRefused(423, "not_in_submit_phase", f"the phase is {phase}; submissions open in {wait} blocks")
    if not cycle.contains(chain.block, submission.block_number):
        first = cycle.start(chain.block)
        raise SubmissionRefused(
            400,
            "block_number_out_of_cycle",
            f"block_number must lie in the current cycle, from {first} to {chain.block}",
        )
    if any(identity != submission.hotkey for identity in context.identities):
        raise SubmissionRefused(403, "hotkey_mismatch", "the request is made with another hotkey than the submission's")
    if not chain.is_miner(submission.hotkey):
        raise SubmissionRefused(403, "hotkey_not_registered", "the hotkey is not registered on the subnet")
    return Candidate(submission, cycle.round(chain.block), rules.max_per_cycle)


def refusal_of(outcome: Duplicate | LimitReached, *, retry_after: int) -> SubmissionRefused:
    """The ledger's refusals as the api answers them; `retry_after`: seconds until the next cycle, for the limit.

    To a Duplicate the api adds `submission_id` where the outcome has one.
    """
    if isinstance(outcome, LimitReached):
        return SubmissionRefused(
            429,
            "too_many_submissions",
            f"{outcome.limit} submissions of this hotkey were accepted in this cycle already",
            retry_after,
        )
    return SubmissionRefused(
        409, "duplicate_submission", "a submission of this hotkey for this block was accepted before"
    )


class _NotAnInteger(float):
    """A JSON number with a fraction, an exponent or too many digits, which no field may be."""


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        # A string with half of a surrogate pair is refused as the field that it is, by the form of that field.
        return parse_json_object(
            raw, parse_int=_parse_integer, parse_float=lambda _: _NotAnInteger(), lone_surrogates=True
        )
    except DuplicateKey:
        raise SubmissionRefused(400, "duplicate_key", "the body names a field twice") from None
    except JsonError as error:
        raise SubmissionRefused(400, "invalid_json", f"the body cannot be read: {error}") from None


def _parse_integer(text: str) -> int | _NotAnInteger:
    return int(text) if _INTEGER.fullmatch(text) and text != "-0" else _NotAnInteger()


def _text(document: dict[str, Any], name: str) -> str:
    value = _field(document, name)
    if not isinstance(value, str):
        raise SubmissionRefused(400, "invalid_field", f"{name} must be a string")
    return value


def _integer(document: dict[str, Any], name: str, maximum: int) -> int:
    value = _field(document, name)
    if type(value) is not int or not 0 <= value <= maximum:  # type(): a bool is an int to isinstance
        raise SubmissionRefused(400, "invalid_field", f"{name} must be a whole number from 0 to {maximum}")
    return value


def _field(document: dict[str, Any], name: str) -> Any:
    if name not in document:
        raise SubmissionRefused(400, "missing_field", f"{name} is missing")
    return document[name]
