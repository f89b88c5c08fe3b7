"""Why a submission got no score: every code, who is at fault, and the sentence that the README prints.

`rejected` is the miner's fault and scores 0; `failed` is ours and gives no score at all. A code never changes its
meaning once a round has been scored with it, because miners' programs branch on it. The table is the whole list:
`Refusal` and `Failure` accept nothing that is not in it, and a test compares the README with it.
"""

from __future__ import annotations

from typing import ClassVar

from bzstream.errors import BzstreamError

__all__ = ["FAILED", "REJECTED", "EvaluationError", "Failure", "ModelClosed", "Refusal"]

REJECTED: dict[str, str] = {
    # Fetching: what the miner's server did.
    "forbidden_url": "The URL, or one it redirects to, breaks the rules: scheme, port, credentials, length or form.",
    "forbidden_address": "The host has an address that is private, loopback, link-local, multicast or reserved.",
    "unreachable": "The name does not resolve, or no connection or TLS session could be made.",
    "http_status": "The server answered with a status other than 200 or 206.",
    "bad_response": "The answer is not valid HTTP/1.1, or its framing contradicts itself.",
    "content_encoding": "The server compressed the file; it must be sent as it is.",
    "too_many_redirects": "More redirects than `evaluation.max_redirects`.",
    "too_large": "The file is larger than the group's slice can be.",
    "truncated": "The connection ended before the announced length.",
    "stalled": "The server sent too little for `evaluation.fetch_stall_s`.",
    "fetch_timeout": "The file did not arrive within `evaluation.fetch_timeout_s` or before the round closed.",
    "hash_mismatch": "The file's SHA-256 is not the signed `checkpoint_hash`.",
    # Reading: what is in the file.
    "not_safetensors_or_pt": "The file is neither a valid safetensors file nor a plain zip checkpoint of `torch.save`.",
    "unsafe_pickle": "The pickle asks for more than dictionaries of plain tensors.",
    "bad_layout": "A tensor is a view, shared, sparse, not contiguous, or its bytes are not exactly its own.",
    "wrong_keys": "The tensor names are not exactly those of the group's slice.",
    "wrong_dtype": "A tensor's dtype is neither the published one nor an allowed cast to it.",
    "wrong_shape": "A tensor's shape is not the published one.",
    "non_finite": "A value, or its change to the published one, is NaN or infinite in the published dtype.",
    "out_of_range": "A value is 64 times the published slice's largest magnitude or more; no training reaches that.",
    "too_costly": "Reading the file took more memory or time than any honest file of this group can.",
    # Scoring.
    "non_finite_loss": "The model's loss with these weights is not finite on some batch.",
    "duplicate_weights": "The weights equal, or nearly equal, those of a submission with precedence.",
    "superseded": "A later submission of the same hotkey in the same cycle counts instead.",
}
"""Code -> what it means, in the order of the pipeline. The miner's fault: score 0."""

FAILED: dict[str, str] = {
    "out_of_memory": "The evaluator ran out of memory.",
    "device_error": "The accelerator reported an error; the evaluator restarts.",
    "evaluation_timeout": "Scoring took longer than `evaluation.score_timeout_s`.",
    "reader_crashed": "The process that reads files died for a reason other than the file's limits.",
    "fetched_too_late": "No evaluator was free before the round closed, and no `checkpoint_hash` was signed.",
    "version_gone": "The model version that the submission builds on is no longer in the store.",
    "unknown_group": "The model version that the submission builds on has no such expert group.",
    "spool_error": "The file could not be written to, or read back from, the evaluator's spool.",
    "baseline_not_finite": "The published model itself has a loss that is not finite.",
    "evaluator_lost": "The submission was lost with its evaluator several times in a row.",
    "internal_error": "A fault of the evaluator; its log has the details.",
}
"""Code -> what it means. The validator's fault: no score."""


class EvaluationError(BzstreamError):
    """The evaluator cannot start or go on: missing data, an ambiguous layout, a model that does not fit."""


class ModelClosed(Exception):
    """The resident model was closed while something waited for it; the submission is staged again for the next."""


class _CodedError(EvaluationError):
    _table: ClassVar[dict[str, str]] = {}

    def __init__(self, code: str, detail: str) -> None:
        if code not in self._table:
            raise ValueError(f"{code!r} is not a code of {type(self).__name__}")
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.code, self.detail)


class Refusal(_CodedError):
    """The submission is rejected, by the miner's fault; `code` is a key of `REJECTED`, `detail` a sentence."""

    _table = REJECTED


class Failure(_CodedError):
    """The submission failed by our fault; `code` is a key of `FAILED`, `detail` a sentence."""

    _table = FAILED
