"""A miner's checkpoint, from its URL into the spool, whatever the miner's server does.

`safe_connect` decides where a connection may lead, `budget` how long and how slow a fetch may be, `fetch` does it. May
import `httpclient`, `submissions.urls` (the policy of `/submit`) and `evaluation`'s table of codes.
"""

from __future__ import annotations

from bzstream.evaluation.fetching.budget import CancelledFetch, Limits
from bzstream.evaluation.fetching.fetch import Fetched, fetch
from bzstream.evaluation.fetching.safe_connect import SafeConnector

__all__ = ["CancelledFetch", "Fetched", "Limits", "SafeConnector", "fetch"]
