"""`bzstream weights`: what a round's scores are worth."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from bzstream.cli._options import AsJson, Config, LedgerFile, Store, existing_ledger, settings_of
from bzstream.errors import BzstreamError

__all__ = ["weights"]


class NoWeights(BzstreamError):
    """There is no such round."""


def weights(
    store: Store = None,
    ledger: LedgerFile = None,
    round_: Annotated[
        int | None, typer.Option("--round", help="First block of its submit phase; default: the latest.")
    ] = None,
    config: Config = None,
    as_json: AsJson = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", hidden=True)] = False,
) -> None:
    """Print the weights that a round's scores become. Only the chain role submits them (chain.set_weights)."""
    from bzstream.chain.weights import weights_of
    from bzstream.submissions.ledger import Ledger

    settings = settings_of(config, {"store.path": store, "ledger.url": ledger})
    book = Ledger.open(existing_ledger(settings))
    try:
        scores = book.scores(round_)
    finally:
        book.close()
    if scores is None:
        which = "no round has results yet" if round_ is None else f"the ledger has no round {round_}"
        raise NoWeights(f"{which}; see GET /scores")
    shares = weights_of(scores.results, settings.chain.weights_top_k)
    if as_json:
        print(json.dumps({"round": scores.round, "model_version": scores.model_version, "weights": shares}, indent=2))
        return
    waiting = sum(result.status not in ("scored", "rejected", "failed") for result in scores.results)
    print(f"round {scores.round}: {len(scores.results)} submissions, {waiting} unfinished, {len(shares)} with weight")
    for hotkey, share in shares.items():
        print(f"{hotkey}  {share:.6f}")
