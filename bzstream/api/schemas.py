"""The JSON bodies of requests and responses, as types.

Responses are encoded from them, and the OpenAPI document is made from them, so that the two cannot differ.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from bzstream.config import ShownAs
from bzstream.submissions.states import Status

__all__ = [
    "AcceptedBody",
    "DuplicateBody",
    "ErrorBody",
    "HealthBody",
    "InvalidSignatureBody",
    "ManifestBody",
    "ModelBody",
    "ScoreRow",
    "ScoresBody",
    "SnapshotBody",
    "SnapshotFile",
    "SnapshotUnit",
    "SubmissionBody",
    "SubmissionStatusBody",
    "UnitEntry",
    "VersionEntry",
]

Hotkey = Annotated[
    str,
    Meta(
        description="SS58 address, prefix 42",
        pattern="^5[1-9A-HJ-NP-Za-km-z]{47}$",
        examples=["5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty"],
        extra_json_schema={"format": "ss58"},
    ),
]
ContentHash = Annotated[str, Meta(pattern=r"^sha256:[0-9a-f]{64}$")]
ModelVersion = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Natural = Annotated[int, Meta(ge=0)]
Group = Annotated[int, Meta(ge=0, le=999_999_999)]
Block = Annotated[int, Meta(ge=0, le=2**53 - 1)]
SubmissionId = Annotated[str, Meta(description="A random UUID", extra_json_schema={"format": "uuid"})]
Moment = Annotated[str, Meta(description="RFC 3339, UTC", extra_json_schema={"format": "date-time"})]


class ErrorBody(Struct, frozen=True):
    """Every response of status 400 and above."""

    detail: Annotated[str, Meta(description="A sentence for a person")]
    code: Annotated[str, Meta(pattern=r"^[a-z0-9_]+$", description="For a program")]


class DuplicateBody(ErrorBody, frozen=True):
    """409 of POST /submit: the hotkey's submission for this block was accepted before."""

    submission_id: Annotated[SubmissionId, Meta(description="Of the identical signed body alone")] | UnsetType = UNSET


class InvalidSignatureBody(ErrorBody, frozen=True):
    """400 of POST /submit."""

    signed_text: (
        Annotated[str, Meta(description="Of code invalid_signature: the exact text that is to be signed")] | UnsetType
    ) = UNSET


class HealthBody(Struct, frozen=True, omit_defaults=True):
    """GET /health: the four members of the specification, and more where there is more to say."""

    status: Literal["healthy", "starting", "degraded", "draining"]
    model_loaded: bool
    current_block: Natural
    phase: ShownAs
    phase_detail: Annotated[str | None, Meta(description="The phase's own name, where chain.phases gives names")] = None
    reasons: Annotated[list[str], Meta(description="Why the status is not healthy, one sentence each")] = []
    chain_age_s: Annotated[float | None, Meta(description="Seconds since the chain was last heard of")] = None


class CodingEntry(Struct, frozen=True):
    """One coded form of a unit: `chunks[i]` is (offset, length, BLAKE3) of payload chunk i in the coded bytes."""

    name: str
    base: ContentHash | None
    size: Natural
    chunks: list[tuple[Natural, Natural, Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]]]


class ManifestBody(Struct, frozen=True):
    """GET /model/{partial,shared,full}/manifest."""

    unit: Literal["partial", "shared", "ungrouped", "full"]
    expert_group: Natural | None
    block_number: Natural
    model_version: ModelVersion
    content_hash: ContentHash
    payload_offset: Natural
    size: Natural
    chunk_size: Annotated[int, Meta(ge=1)]
    chunk_hash: Literal["blake3"]
    chunks: list[Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]]
    validator_hotkey: Hotkey | None
    signature: str | None
    codings: list[CodingEntry] | UnsetType = UNSET
    """Left out when the unit has none."""


class UnitEntry(Struct, frozen=True):
    """One unit of one version. The full model has no envelope: its two ETags are one."""

    unit: str
    expert_group: Natural | None
    size: Annotated[int, Meta(ge=0, description="Payload bytes")]
    content_hash: ContentHash
    etag: str
    etag_enveloped: str


class VersionEntry(Struct, frozen=True):
    model_version: ModelVersion
    block_number: Natural
    published_at: Moment
    signed: Annotated[bool, Meta(description="Whether the validator's signature stands in its manifests")]
    units: list[UnitEntry]


class ModelBody(Struct, frozen=True):
    """GET /model: what is served; `versions` begins with the newest."""

    validator_hotkey: Annotated[Hotkey | None, Meta(description="This node's address, the receiver of proofs")]
    current: ModelVersion
    versions: list[VersionEntry]


class SnapshotUnit(Struct, frozen=True):
    name: Annotated[str, Meta(description="partial/<group>, shared, ungrouped or full")]
    size: Natural
    content_hash: ContentHash


class SnapshotFile(Struct, frozen=True):
    """One of the source's small files, such as config.json or the tokenizer's."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}\.(json|txt|model|jinja)$")]
    size: Natural
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
    content: Annotated[str, Meta(description="base64")]


class SnapshotBody(Struct, frozen=True):
    """GET /model/snapshot. `signature` is over the canonical JSON of all other fields; null without a wallet."""

    model_version: ModelVersion
    block_number: Natural
    sequence: Annotated[int, Meta(ge=0, description="Rises with every activation on this node")]
    units: list[SnapshotUnit]
    expert_map: Annotated[dict[str, dict[str, list[Natural]]], Meta(description="Group -> layer -> original indices")]
    files: list[SnapshotFile]
    validator_hotkey: Hotkey | None
    signature: str | None


class SubmissionBody(Struct, frozen=True):
    """POST /submit. Unknown fields are ignored."""

    hotkey: Hotkey
    expert_group: Group
    checkpoint_url: Annotated[str, Meta(max_length=2048, extra_json_schema={"format": "uri"})]
    block_number: Block
    signature: Annotated[
        str,
        Meta(
            pattern="^[A-Za-z0-9_-]{85}[AQgw](==)?$",
            description="URL-safe base64, padded or not, of the 64-byte ed25519 or sr25519 signature by `hotkey` over "
            "the canonical JSON (RFC 8785) of the other fields: keys sorted, no white space, UTF-8, such as "
            '`{"block_number":12345,"checkpoint_url":"https://…","expert_group":0,"hotkey":"5F…"}`, with '
            "`checkpoint_hash` before `checkpoint_url` if it is sent. A wallet may wrap that text in `<Bytes>` and "
            "`</Bytes>` before it signs.",
        ),
    ]
    checkpoint_hash: Annotated[ContentHash, Meta(description="Of the file behind the URL")] | UnsetType = UNSET


class AcceptedBody(Struct, frozen=True):
    """202: the submission is on disk."""

    status: Literal["accepted"]
    submission_id: SubmissionId
    evaluation_eta_blocks: Annotated[int, Meta(ge=1)]


class SubmissionStatusBody(Struct, frozen=True):
    """GET /submissions/{submission_id}."""

    submission_id: SubmissionId
    hotkey: Hotkey
    expert_group: Natural
    block_number: Natural
    status: Status
    reason: str | None
    baseline_loss: float | None
    loss: float | None
    score: float | None
    received_at: Moment
    finished_at: Moment | None


class ScoreRow(Struct, frozen=True):
    hotkey: Hotkey
    expert_group: Natural
    submission_id: SubmissionId
    status: Status
    reason: str | None
    score: float | None
    """The own improvement, nats a token."""
    pay: float | None
    """What it contributes, in the same unit; null until its group is settled."""


class ScoresBody(Struct, frozen=True):
    """GET /scores: one round."""

    round: Natural
    model_version: ModelVersion | None
    results: list[ScoreRow]
