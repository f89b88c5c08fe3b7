"""The miner's and the peer's side: pull units, fetch tensors, submit a checkpoint, measure a link.

May import the leaves (payload, tensorfile, config, errors) and `chain` (keys and proofs), nothing else of bzstream.
"""

from __future__ import annotations

from bzstream.client.address import Address, Want, parse_address
from bzstream.client.aio import fetch_tensors_async, pull_async
from bzstream.client.entry import UsageError
from bzstream.client.errors import (
    BadManifest,
    BadSignature,
    BadUrl,
    Busy,
    ClientError,
    DiskTrouble,
    Dropped,
    FolderBusy,
    Forbidden,
    Misbehaved,
    Moved,
    NotFound,
    Passing,
    Refused,
    Stalled,
    Stopped,
    Unauthorized,
    Unreachable,
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
    "BadSignature",
    "BadUrl",
    "Busy",
    "ClientError",
    "DiskTrouble",
    "Dropped",
    "FolderBusy",
    "Forbidden",
    "LinkReport",
    "Manifest",
    "Misbehaved",
    "Moved",
    "NotFound",
    "Passing",
    "Progress",
    "PullReport",
    "Refused",
    "Stalled",
    "Stopped",
    "SubmissionReport",
    "SubmissionStatus",
    "Sweep",
    "Tuning",
    "Unauthorized",
    "UnitReport",
    "Unreachable",
    "UsageError",
    "Want",
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
