"""`bzstream weights`: what a round's scores are worth."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from bzstream.errors import BzstreamError

__all__ = ["weights"]


class NoWeights(BzstreamError):
    """There is no such round, or nothing is to be submitted by hand."""


def weights(
    store: Annotated[Path | None, typer.Option(help="The store, which holds the ledger by default.")] = None,
    ledger: Annotated[Path | None, typer.Option(help="The ledger's file; default: as `serve`, or BZ_LEDGER.")] = None,
    round_: Annotated[
        int | None, typer.Option("--round", help="First block of its submit phase; default: the latest.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print them, submit nothing.")] = False,
    config: Annotated[Path | None, typer.Option(help="Settings file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the weights that a round's scores become; the chain role submits them (chain.set_weights)."""
    from bzstream import config as configuration
    from bzstream.chain.weights import weights_of
    from bzstream.submissions.ledger import Ledger

    if not dry_run:
        raise NoWeights("weights are submitted by `serve` with chain.set_weights = true; to see them add --dry-run")
    flags = {"store.path": None if store is None else str(store), "ledger.url": None if ledger is None else str(ledger)}
    settings = configuration.load(file=config, environment=os.environ, flags=flags)
    place = settings.ledger_location()
    if "://" not in place and not Path(place).exists():  # opening would make an empty one
        raise NoWeights(f"there is no ledger {place}; give --store or --ledger")
    book = Ledger.open(place)
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
