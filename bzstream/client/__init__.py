"""The miner's and the peer's side: pull units, fetch tensors, submit a checkpoint, measure a link.

May import `httpclient`, `chain` (keys and proofs) and the foundation (tensorfile, errors, util).
"""

from __future__ import annotations

from bzstream.client.address import Address, UnitRef, parse_address
from bzstream.client.aio import fetch_tensors_async, pull_async
from bzstream.client.errors import (
    BadManifest,
    BadProxy,
    BadSignature,
    BadUrl,
    Busy,
    ClientError,
    ConnectionLost,
    DiskError,
    FolderBusy,
    Forbidden,
    NotFound,
    ProtocolViolation,
    Refused,
    Stalled,
    Stopped,
    TransientError,
    Unauthorized,
    Unreachable,
    UsageError,
    VersionChanged,
    WrongHash,
)
from bzstream.client.manifest import Manifest, parse_manifest
from bzstream.client.measure import LinkReport, Sweep, measure
from bzstream.client.progress import Progress, PullReport, UnitReport
from bzstream.client.pull import pull
from bzstream.client.submit import SubmissionReport, SubmissionStatus, follow, submit
from bzstream.client.tensors import fetch_tensors
from bzstream.client.tuning import Tuning

__all__ = [
    "Address",
    "BadManifest",
    "BadProxy",
    "BadSignature",
    "BadUrl",
    "Busy",
    "ClientError",
    "ConnectionLost",
    "DiskError",
    "FolderBusy",
    "Forbidden",
    "LinkReport",
    "Manifest",
    "NotFound",
    "Progress",
    "ProtocolViolation",
    "PullReport",
    "Refused",
    "Stalled",
    "Stopped",
    "SubmissionReport",
    "SubmissionStatus",
    "Sweep",
    "TransientError",
    "Tuning",
    "Unauthorized",
    "UnitRef",
    "UnitReport",
    "Unreachable",
    "UsageError",
    "VersionChanged",
    "WrongHash",
    "fetch_tensors",
    "fetch_tensors_async",
    "follow",
    "measure",
    "parse_address",
    "parse_manifest",
    "pull",
    "pull_async",
    "submit",
]
