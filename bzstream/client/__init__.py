"""The miner's and the peer's side: pull units, fetch tensors, submit a checkpoint, measure a link, sync a store.

May import `httpclient`, `chain` (keys and proofs), the foundation (tensorfile, errors, util) and, for `client.sync`
alone, which is not imported here, `model`.
"""

from __future__ import annotations

from bzstream.client.aio import fetch_tensors_async, pull_async
from bzstream.client.axon import find_axon
from bzstream.client.errors import *  # noqa: F403
from bzstream.client.errors import __all__ as __all__
from bzstream.client.measure import LinkReport, Sweep, measure
from bzstream.client.node_info import NodeInfo, UnitInfo, VersionInfo, info
from bzstream.client.progress import Progress, PullReport, UnitReport
from bzstream.client.pull import pull
from bzstream.client.submit import SubmissionReport, SubmissionStatus, follow, submit
from bzstream.client.tensors import fetch_tensors
from bzstream.client.tuning import Tuning

__all__ += (
    "LinkReport", "NodeInfo", "Progress", "PullReport", "SubmissionReport", "SubmissionStatus", "Sweep", "Tuning",
    "UnitInfo", "UnitReport", "VersionInfo", "fetch_tensors", "fetch_tensors_async", "find_axon", "follow", "info",
    "measure", "pull", "pull_async", "submit",
)  # fmt: skip
